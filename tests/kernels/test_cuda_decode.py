"""The CUDA decode kernels without a GPU, emulated on the CPU (cuda_emulation.py); refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.cuda_emulation import EmulatedGpu, decode
from tests.kernels.decode_batches import Inputs, oracle, random_batch, random_inputs
from tw_kernels import _C, PagedKV, PlanSizes, backends
from tw_kernels.decode.op import choose_backend

ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # of a result


@pytest.fixture(scope="module")
def gpu():
    return EmulatedGpu()


def padded_inputs(inputs: Inputs, extra: int) -> Inputs:
    q, new_k, new_v = (
        torch.cat([x, torch.full((extra, *x.shape[1:]), 7.0, dtype=x.dtype)])
        for x in (inputs.q, inputs.new_k, inputs.new_v)
    )
    return Inputs(q, inputs.kv, new_k, new_v)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    sequences=st.integers(1, 8),
    page_size=st.sampled_from([16, 32, 64, 128, 192]),
    longest=st.sampled_from([3, 50, 300]),
    most_new=st.sampled_from([1, 5, 150]),
    kv_heads=st.sampled_from([1, 2]),
    group=st.integers(1, 16),
    head_dim=st.sampled_from([64, 128]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    workers=st.sampled_from([1, 16]),
    tile_rows=st.sampled_from([5, 64]),
    share=st.booleans(),
    spare=st.sampled_from([0, 3]),
)
def test_random_batches_agree_with_the_definition(
    gpu, seed, sequences, page_size, longest, most_new, kv_heads, group, head_dim, dtype,
    workers, tile_rows, share, spare,
):  # fmt: skip
    batch = random_batch(seed, sequences, page_size, longest, most_new)
    heads = kv_heads * group, kv_heads, head_dim
    inputs = random_inputs(batch, heads, dtype, seed % 997)
    options = {"num_workers": workers, "tile_rows": tile_rows, "share": share}
    room = PlanSizes(*(n + spare for n in batch.plan(**options).size))
    got = gpu(decode, padded_inputs(inputs, spare), batch.plan(**options, capacity=room))
    # Slots beyond the lengths hold NaN, as do those of new tokens until the call writes them.
    want = oracle(batch, inputs, head_dim**-0.5)
    torch.testing.assert_close(
        got[: batch.num_rows].double(), want, rtol=ROUNDOFF[dtype], atol=1e-6
    )
    assert (got[batch.num_rows :] == 0).all()


def test_heads_and_pages_may_be_strided_views(gpu):
    batch = random_batch(16, sequences=3, page_size=16, longest=90, most_new=2)
    inputs = random_inputs(batch, (4, 2, 64), torch.bfloat16)
    qkv = torch.cat([inputs.q, inputs.new_k, inputs.new_v], 1)
    pool = torch.stack([inputs.kv.k_pages, inputs.kv.v_pages], 1).repeat(1, 1, 2, 1, 1)
    views = Inputs(qkv[:, :4], PagedKV(pool[:, 0, :16], pool[:, 1, :16]), qkv[:, 4:6], qkv[:, 6:])
    got, want = gpu(decode, views, batch.plan()), gpu(decode, inputs, batch.plan())
    assert torch.equal(got, want)


DENSE = (4096, 4096, 1024, 64, 64)  # addresses of K and V, strides of pages, slots and heads
SIZES = (1, 1, 1, 64, 2, 1, 64, 5, 16)  # the last three: head dim, pages, page size


def sizes(head_dim: int = 64, pages: int = 5, page_size: int = 16) -> tuple:
    return (*SIZES[:6], head_dim, pages, page_size)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ((SIZES, 0, DENSE), "take bfloat16 and float16, not float32"),
        ((sizes(head_dim=96), 1, DENSE), "take head dims 64 and 128, not 96"),
        ((sizes(page_size=8), 1, DENSE), "pages of 16, 32 or a multiple of 64 tokens, not 8"),
        ((sizes(page_size=48), 1, DENSE), "pages of 16, 32 or a multiple of 64 tokens, not 48"),
        ((sizes(pages=0), 1, DENSE), "a size of 0 in dimension 3, not 1 to 2^32"),
        ((sizes(pages=2**32 + 1), 1, DENSE), "a size of 4294967297 in dimension 3"),
        ((SIZES, 1, (4104, *DENSE[1:])), "pages with an address that is not a multiple of 16"),
        ((SIZES, 1, (4096, 4104, *DENSE[2:])), "pages with an address that is not a multiple"),
        ((SIZES, 1, (*DENSE[:3], 68, 64)), "a stride of 136 bytes in dimension 2, not a multiple"),
        ((SIZES, 1, (*DENSE[:2], 2**39, 64, 64)), "a stride of 1099511627776 bytes in dimension 3"),
    ],
)
def test_what_the_kernels_do_not_take_is_refused_by_name(call, reason):
    assert _C.cuda_trie_decode_refusal(SIZES, 1, DENSE) == ""
    assert reason in _C.cuda_trie_decode_refusal(*call)


def test_the_backend_is_only_asked_for_by_name_and_says_why_not():
    reason = backends("trie_decode")["cuda"]
    if not torch.cuda.is_available():
        assert reason and "CUDA driver" in reason
    pages = torch.zeros(1, 16, 1, 64, dtype=torch.bfloat16)
    q, kv = torch.zeros(1, 1, 64, dtype=torch.bfloat16), PagedKV(pages, pages.clone())
    assert choose_backend(q, kv) == "native"
    with pytest.raises(ValueError, match="trie_decode cannot run this call: cuda: "):
        choose_backend(q, kv, "cuda")
