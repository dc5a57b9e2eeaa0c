"""The CUDA decode kernels without a GPU: index arithmetic in emulation, and the host's half.

cuda_decode_emulation.cpp runs a call step by step on the CPU, in double precision, over the very
arguments, launches and index functions that a GPU would get.
"""

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels import cuda_decode_host
from tests.kernels.cuda_decode_host import Pages, Tiles, arguments
from tests.kernels.decode_batches import (
    Batch,
    Inputs,
    fork_join_batch,
    oracle,
    random_batch,
    random_inputs,
)
from tests.kernels.tries import relative_error
from tw_kernels import DecodePlan, PagedKV, PlanSizes, backends
from tw_kernels.decode.op import choose_backend


@pytest.fixture(scope="module")
def emulator():
    return cuda_decode_host.library()


def emulate(emulator, inputs: Inputs, plan: DecodePlan) -> Tensor:
    """out [Q, Hq, D] in float64, from copies of the pages."""
    inputs = inputs.copy()
    args = arguments(inputs, plan)
    partial_out = torch.full((plan.capacity.slots, *inputs.q.shape[1:]), torch.nan)
    partial_lse = torch.full(partial_out.shape[:2], torch.nan)
    out = torch.full(inputs.q.shape, torch.nan, dtype=torch.float64)
    args.partial_out, args.partial_lse = partial_out.data_ptr(), partial_lse.data_ptr()
    failure = emulator.emulate_trie_decode(ctypes.byref(args), ctypes.c_void_p(out.data_ptr()))
    assert failure is None, failure.decode()
    return out


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
def test_every_step_of_the_kernels_finds_what_it_needs(
    emulator, seed, sequences, page_size, longest, most_new, kv_heads, group, head_dim, dtype,
    workers, tile_rows, share, spare,
):  # fmt: skip
    batch = random_batch(seed, sequences, page_size, longest, most_new)
    heads = kv_heads * group, kv_heads, head_dim
    inputs = random_inputs(batch, heads, dtype, seed % 997)
    options = {"num_workers": workers, "tile_rows": tile_rows, "share": share}
    room = PlanSizes(*(n + spare for n in batch.plan(**options).size))
    plan = batch.plan(**options, capacity=room)
    got = emulate(emulator, padded_inputs(inputs, spare), plan)
    # Slots beyond the lengths hold NaN, as do those of new tokens until the call writes them.
    assert relative_error(got[: batch.num_rows], oracle(batch, inputs, head_dim**-0.5)) <= 1e-6
    assert (got[batch.num_rows :] == 0).all()


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    head_dim=st.sampled_from([64, 128]),
    warpgroups=st.sampled_from([1, 2]),
    tiles=st.integers(0, 40),
)
def test_no_slot_of_the_ring_is_read_early_or_filled_early_in_any_order(
    emulator, seed, head_dim, warpgroups, tiles
):
    assert emulator.emulate_ring(head_dim, warpgroups, 2 * tiles, seed) is None


def test_new_keys_are_read_in_the_call_that_writes_them(emulator):
    batch = Batch([[0, 1], [0, 2]], [24, 20], [20, 2], page_size=16, num_pages=3)
    inputs = random_inputs(batch, (2, 1, 64), torch.bfloat16)
    assert inputs.kv.k_pages[0, 4:].isnan().all()
    changed = Inputs(inputs.q, inputs.kv, inputs.new_k, inputs.new_v.clone())
    changed.new_v[2] += 1  # position 6: in the page that both read
    plan = batch.plan()
    differs = (emulate(emulator, inputs, plan) != emulate(emulator, changed, plan)).flatten(1)
    assert differs.any(1).tolist() == [False] * 2 + [True] * 20


def test_heads_and_pages_may_be_strided_views(emulator):
    batch = random_batch(16, sequences=3, page_size=16, longest=90, most_new=2)
    inputs = random_inputs(batch, (4, 2, 64), torch.bfloat16)
    want = emulate(emulator, inputs, batch.plan())
    qkv = torch.cat([inputs.q, inputs.new_k, inputs.new_v], 1)
    pool = torch.stack([inputs.kv.k_pages, inputs.kv.v_pages], 1).repeat(1, 1, 2, 1, 1)
    views = Inputs(qkv[:, :4], PagedKV(pool[:, 0, :16], pool[:, 1, :16]), qkv[:, 4:6], qkv[:, 6:])
    args = arguments(views, batch.plan())
    assert emulator.why_not_trie_decode(ctypes.byref(args)) == b""
    assert torch.equal(emulate(emulator, views, batch.plan()), want)


def test_a_nan_that_a_row_sees_is_not_taken_for_a_row_that_sees_nothing(emulator):
    batch = fork_join_batch(prefix=32, suffix=5, prompts=1, threads=2, page_size=16)
    inputs = random_inputs(batch, (1, 1, 64), torch.bfloat16)
    inputs.q[1] = torch.nan
    got = emulate(emulator, inputs, batch.plan())
    assert got[0].isfinite().all() and got[1].isnan().all()


def test_boxes_of_pages_are_what_the_copy_engine_takes(emulator):
    for page_size, keys in ((16, 16), (32, 32), (64, 64), (128, 64), (192, 64)):
        batch = fork_join_batch(
            prefix=page_size, suffix=1, prompts=1, threads=2, page_size=page_size
        )
        for head_dim in (64, 128):
            inputs = random_inputs(batch, (6, 3, head_dim), torch.bfloat16)
            args, tiles = arguments(inputs, batch.plan()), Tiles()
            emulator.tiles_of_pages(ctypes.byref(args), ctypes.byref(tiles))
            assert emulator.why_not_tiles(ctypes.byref(tiles)) == b""
            assert (tiles.element, tiles.swizzle, tiles.rank) == (9, 3, 4)
            assert tiles.address == inputs.kv.k_pages.data_ptr()
            assert tiles.sizes[:4] == [head_dim, 3, page_size, batch.num_pages]
            row = 3 * head_dim * 2
            assert tiles.strides[1:4] == [head_dim * 2, row, page_size * row]
            assert tiles.box[:4] == [64, 1, keys, 1]


def tiles_of(**change) -> Tiles:
    tiles = Tiles(9, 3, 2, 4096, (64, 100), (0, 128), (64, 64))
    for name, value in change.items():
        setattr(
            tiles,
            name,
            type(getattr(tiles, name))(*value) if name in "sizes strides box" else value,
        )
    return tiles


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rank": 6}, "a tensor of 6 dimensions, not 1 to 5"),
        ({"address": 4104}, "an address that is not a multiple of 16 bytes"),
        ({"sizes": (64, 0)}, "a size of 0 in dimension 1, not 1 to 2^32"),
        ({"sizes": (64, 2**32 + 1)}, "a size of 4294967297 in dimension 1"),
        ({"strides": (0, 136)}, "a stride of 136 bytes in dimension 1, not a multiple of 16"),
        ({"strides": (0, 2**40)}, "a stride of 1099511627776 bytes in dimension 1"),
        ({"box": (64, 257)}, "a box of 257 elements in dimension 1, not 1 to 256"),
        ({"box": (0, 64)}, "a box of 0 elements in dimension 0"),
        ({"box": (4, 64)}, "a box of 8 bytes a row, not a multiple of 16"),
        ({"box": (128, 64)}, "a box of 256 bytes a row, above the swizzle's 128"),
        ({"swizzle": 1}, "a box of 128 bytes a row, above the swizzle's 32"),
    ],
)
def test_what_the_copy_engine_does_not_take_is_refused_by_name(emulator, change, reason):
    assert emulator.why_not_tiles(ctypes.byref(tiles_of())) == b""
    assert reason in emulator.why_not_tiles(ctypes.byref(tiles_of(**change))).decode()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"element": 7}, "take bfloat16 and float16, not float32"),
        ({"head_dim": 96}, "take head dims 64 and 128, not 96"),
        ({"page_size": 8}, "take pages of 16, 32 or a multiple of 64 tokens, not 8"),
        ({"page_size": 48}, "take pages of 16, 32 or a multiple of 64 tokens, not 48"),
        ({"kv": Pages(4104, 4096, 1024, 64, 64)}, "pages with an address that is not a multiple"),
        ({"kv": Pages(4096, 4104, 1024, 64, 64)}, "pages with an address that is not a multiple"),
        (
            {"kv": Pages(4096, 4096, 1024, 68, 64)},
            "pages with a stride of 136 bytes in dimension 2",
        ),
    ],
)
def test_shapes_that_the_kernels_do_not_take_are_refused_by_name(emulator, change, reason):
    batch = fork_join_batch(prefix=16, suffix=1, prompts=1, threads=2, page_size=16)
    args = arguments(random_inputs(batch, (2, 1, 64), torch.bfloat16), batch.plan())
    assert emulator.why_not_trie_decode(ctypes.byref(args)) == b""
    for name, value in change.items():
        setattr(args, name, value)
    assert reason in emulator.why_not_trie_decode(ctypes.byref(args)).decode()


def test_the_backend_is_only_asked_for_by_name_and_says_why_not():
    reason = backends("trie_decode")["cuda"]
    if not torch.cuda.is_available():
        assert reason and "CUDA driver" in reason
    pages = torch.zeros(1, 16, 1, 64, dtype=torch.bfloat16)
    q, kv = torch.zeros(1, 1, 64, dtype=torch.bfloat16), PagedKV(pages, pages.clone())
    assert choose_backend(q, kv) == "native"
    with pytest.raises(ValueError, match="trie_decode cannot run this call: cuda: "):
        choose_backend(q, kv, "cuda")
