"""The CUDA decode kernels without a GPU, emulated on the CPU (cuda_emulation.py); refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.cuda_emulation import EmulatedGpu, decode
from tests.kernels.decode_batches import (
    Batch,
    Inputs,
    fork_join_batch,
    oracle,
    random_batch,
    random_inputs,
)
from tw_kernels import _C, PagedKV, PlanSizes, backends
from tw_kernels.decode.costs import Heads, of_gpu
from tw_kernels.decode.op import choose_backend

ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # of a rounding, at most


@pytest.fixture(scope="module")
def gpu():
    return EmulatedGpu()


def rounding(batch: Batch, inputs: Inputs, want: Tensor) -> Tensor:
    """Bound of the error of results in the dtype of q, which weigh partial results of that dtype.

    The result is rounded, and so is each partial result: weighed together those are at most the
    attention over the values' magnitudes.
    """
    kv = PagedKV(inputs.kv.k_pages, inputs.kv.v_pages.abs())
    magnitudes = Inputs(inputs.q, kv, inputs.new_k, inputs.new_v.abs())
    parts = oracle(batch, magnitudes, inputs.q.shape[-1] ** -0.5)
    return 1.01 * ROUNDOFF[inputs.q.dtype] * (want.abs() + parts)


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
    tile_rows=st.sampled_from([None, 5, 64]),  # None: a tile of matrix rows
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
    costs = of_gpu(workers, Heads(*heads))
    options = {"num_workers": workers, "tile_rows": tile_rows, "share": share, "costs": costs}
    room = PlanSizes(*(n + spare for n in batch.plan(**options).size))
    got = gpu(decode, padded_inputs(inputs, spare), batch.plan(**options, capacity=room))
    # Slots beyond the lengths hold NaN, as do those of new tokens until the call writes them.
    want = oracle(batch, inputs, head_dim**-0.5)
    error = (got[: batch.num_rows].double() - want).abs()
    assert (error <= rounding(batch, inputs, want) + 1e-6).all()
    assert (got[batch.num_rows :] == 0).all()


def test_heads_and_pages_may_be_strided_views(gpu):
    batch = random_batch(16, sequences=3, page_size=16, longest=90, most_new=2)
    inputs = random_inputs(batch, (4, 2, 64), torch.bfloat16)
    qkv = torch.cat([inputs.q, inputs.new_k, inputs.new_v], 1)
    pool = torch.stack([inputs.kv.k_pages, inputs.kv.v_pages], 1).repeat(1, 1, 2, 1, 1)
    views = Inputs(qkv[:, :4], PagedKV(pool[:, 0, :16], pool[:, 1, :16]), qkv[:, 4:6], qkv[:, 6:])
    got, want = gpu(decode, views, batch.plan()), gpu(decode, inputs, batch.plan())
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", ROUNDOFF, ids=str)
def test_rounded_partial_results_add_half_a_rounding_to_the_error(gpu, dtype):
    # Their roundings are as large as the result's and independent of it, however many they are: the
    # error grows by the square root of 2. The probabilities, which the tensor cores take in the
    # dtype too, are exact here and add the same again on a GPU, with and without parts.
    batch = fork_join_batch(prefix=2048, suffix=40, prompts=1, threads=4, page_size=16)
    inputs = random_inputs(batch, (8, 2, 64), dtype)
    want = oracle(batch, inputs, 64**-0.5)
    # Alone, and uncut: results leave the kernel as they are.
    plans = {
        1: batch.plan(share=False, costs=of_gpu(1, Heads(8, 2, 64))._replace(waves=(0.1,))),
        17: batch.plan(costs=of_gpu(1, Heads(8, 2, 64))._replace(waves=(200.0,))),
    }
    errors = []
    for parts, plan in plans.items():
        assert plan.merge_ptr.diff().max() == parts
        errors.append((gpu(decode, inputs, plan).double() - want).square().mean().sqrt().item())
    print(f"{dtype}: error {errors[0]:.2e} of whole results, {errors[1]:.2e} of 17 parts")
    assert errors[1] <= 1.6 * errors[0]


def test_a_row_with_one_result_is_written_straight_to_the_output(gpu):
    batch = random_batch(7, sequences=5, page_size=16, longest=60)
    plan = batch.plan(share=False, num_workers=1, costs=of_gpu(1, Heads(4, 2, 64)))
    assert (plan.merge_ptr.diff() == 1).all()
    inputs = random_inputs(batch, (4, 2, 64), torch.bfloat16)
    want = oracle(batch, inputs, 64**-0.5)
    got = gpu(decode, inputs, plan).double()
    # One rounding, not two.
    torch.testing.assert_close(got, want, rtol=1.01 * ROUNDOFF[torch.bfloat16], atol=1e-6)


def test_the_same_call_gives_the_same_bits_on_any_number_of_multiprocessors(gpu):
    batch = random_batch(8, sequences=12, page_size=16, longest=300, most_new=3)
    inputs = random_inputs(batch, (16, 2, 64), torch.bfloat16)
    plan = batch.plan(costs=of_gpu(4, Heads(16, 2, 64)))
    results = [gpu(decode, inputs, plan, count) for count in (1, 3, 132, 3)]
    assert all(torch.equal(result, results[0]) for result in results)


DENSE = (4096, 4096, 1024, 64, 64)  # addresses of K and V, strides of pages, slots and heads
SIZES = (1, 1, 64, 1, 2, 1, 64, 5, 16)  # the last three: head dim, pages, page size


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
