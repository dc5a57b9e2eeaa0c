"""The CUDA trie attention kernels without a GPU: emulated on the CPU, and the host's half.

cuda_attention_emulation.cpp runs a call step by step, in double precision, over the very
arguments, grids and index functions that a GPU would get.
"""

import ctypes

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.cubins import SHARED_LIMIT
from tests.kernels.cuda_attention_host import Emulator, Heads, TrieAttentionArgs, library, streams
from tests.kernels.cuda_decode_host import Tiles
from tests.kernels.rounding import allowed, gradient_terms
from tests.kernels.tries import oracle, random_paths, real_trees, relative_error, visible
from tw_kernels import Trie, TrieLayout
from tw_kernels.attention import cuda as cuda_attention

EXACT = 1e-6  # what the float32 of lse, lse2 and delta leaves of a double


def inputs(n: int, heads: tuple[int, int], head_dim: int, seed: int = 0) -> list[Tensor]:
    """q, k, v, dout in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    counts = (heads[0], heads[1], heads[1], heads[0])
    return [torch.randn(n, h, head_dim, generator=generator).bfloat16() for h in counts]


def gradients(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor, scale
) -> list[Tensor]:
    """dq, dk, dv in float64 by the formulas of csrc/cuda/trie_attention_bwd.cu, from this out."""
    group = q.shape[1] // k.shape[1]
    dout, q, k, v, out = (x.double() for x in (dout, q, k, v, out))
    k_of, v_of = (x.repeat_interleave(group, 1) for x in (k, v))
    p = (torch.einsum("ihd,jhd->hij", q, k_of) * scale - lse.double()[:, :, None]).exp() * mask
    delta = (dout * out).sum(-1).T
    ds = p * (torch.einsum("ihd,jhd->hij", dout, v_of) - delta[:, :, None])
    dq = torch.einsum("hij,jhd->ihd", ds, k_of) * scale
    dk = torch.einsum("hij,ihd->jhd", ds, q) * scale
    dv = torch.einsum("hij,ihd->jhd", p, dout)
    dk, dv = (x.unflatten(1, (-1, group)).sum(2) for x in (dk, dv))
    return [dq, dk, dv]


def assert_emulation_equals_the_definition(
    layout: TrieLayout, tensors: list[Tensor], multiprocessors: int
) -> None:
    q, k, v, dout = tensors
    scale = q.shape[2] ** -0.5
    mask = visible(layout.subtree_ends)
    emulator = Emulator(multiprocessors)
    out, lse = emulator.forward(layout, q, k, v, scale)
    want_out, want_lse = oracle(q, k, v, mask, scale)
    assert relative_error(out, want_out) <= EXACT
    assert relative_error(lse, want_lse) <= EXACT
    rounded, lse = out.bfloat16(), lse.float()
    got = emulator.backward(layout, dout, q, k, v, rounded, lse, scale)
    want = gradients(dout, q, k, v, rounded, lse, mask, scale)
    for a, b, sizes in zip(got, want, gradient_terms(tensors, mask, scale), strict=True):
        assert a.isfinite().all()
        assert (a - b).norm() <= allowed(EXACT, b, sizes)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    roots=st.integers(1, 4),
    branches=st.sampled_from([0, 2, 12]),
    length=st.sampled_from([3, 40, 120]),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    head_dim=st.sampled_from([64, 128]),
    multiprocessors=st.sampled_from([1, 2, 132]),
)
def test_every_step_of_the_kernels_finds_what_it_needs(
    seed, roots, branches, length, kv_heads, group, head_dim, multiprocessors
):
    paths = random_paths(np.random.default_rng(seed), roots, branches, length)
    layout = Trie.from_paths(paths).layout()
    tensors = inputs(layout.num_tokens, (kv_heads * group, kv_heads), head_dim, seed % 997)
    assert_emulation_equals_the_definition(layout, tensors, multiprocessors)


@pytest.mark.parametrize("n", [1, 63, 64, 65, 127, 128, 129, 191, 192, 256])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_ragged_last_tiles(n, head_dim):
    layout = TrieLayout(torch.full((n,), n, dtype=torch.int32))
    assert_emulation_equals_the_definition(layout, inputs(n, (1, 1), head_dim), 2)


def test_rows_that_see_nothing_of_their_first_tiles():
    # Three rows of 128 behind a root of 100 tokens, which most of them are strangers to.
    layout = Trie.pack([Trie.from_paths([list(range(n))]) for n in (100, 1, 60, 223)]).layout()
    assert_emulation_equals_the_definition(layout, inputs(384, (1, 1), 64), 1)


@pytest.mark.parametrize("task", sorted(real_trees(0.01))[::5])
def test_real_trees(task):
    layout = real_trees(0.015)[task].layout()
    assert_emulation_equals_the_definition(layout, inputs(layout.num_tokens, (2, 1), 64), 3)


def test_strided_views_are_read_as_they_are():
    layout = TrieLayout(torch.full((150,), 150, dtype=torch.int32))
    q, k, v, _ = inputs(150, (4, 2), 64)
    emulator = Emulator(3)
    want = emulator.forward(layout, q, k, v, 0.1)
    q, k, v = torch.cat([q, k, v], 1).split([4, 2, 2], 1)
    assert all(cuda_attention._for_bulk_copies(x) is x for x in (q, k, v))
    got = emulator.forward(layout, q, k, v, 0.1)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@given(
    work=st.lists(st.integers(1, 50), min_size=1, max_size=200),
    blocks=st.integers(1, 40),
)
def test_the_persistent_grid_takes_every_tile_once_and_is_balanced_to_one_tile(work, blocks):
    work = sorted(work, reverse=True)
    blocks = min(blocks, len(work))
    tile_of = library().tile_of_round
    rounds = -(-len(work) // blocks)
    taken = [[tile_of(r, blocks, b) for r in range(rounds)] for b in range(blocks)]
    # A block stops at its first tile beyond the last: that must be in the last round.
    assert all(t < len(work) for tiles in taken for t in tiles[:-1])
    done = [[t for t in tiles if t < len(work)] for tiles in taken]
    assert sorted(t for tiles in done for t in tiles) == list(range(len(work)))
    loads = [sum(work[t] for t in tiles) for tiles in done]
    assert max(loads) - min(loads) <= work[0]


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_plan_is_for_the_tiles_that_the_kernels_take(head_dim):
    streamed = tuple(rows for rows, _ in streams(library(), head_dim))
    assert cuda_attention.STREAMED_ROWS[head_dim] == streamed
    layout = Trie.from_paths([list(range(200))]).layout()
    plan = cuda_attention.plan(layout, torch.empty(200, 1, head_dim))
    ends, forward, dq, dkv = plan
    assert ends.tolist() == [200] * 200 + [0] * 56
    blocks = [-(-200 // rows) for rows in streamed]
    assert [forward.kv_order.numel(), dq.kv_order.numel(), dkv.q_order.numel()] == blocks
    assert forward.q_order.numel() == dq.q_order.numel() == dkv.kv_order.numel() == 2
    again = cuda_attention.plan(layout, torch.empty(200, 1, head_dim))
    assert all(a is b for a, b in zip(plan, again, strict=True))


def copyable(args: TrieAttentionArgs, tensor: Tensor, heads: int, rows: int) -> Tiles:
    tiles = Tiles()
    library().tiles_of_tensor(
        ctypes.byref(args),
        ctypes.byref(Heads.of(tensor)),
        ctypes.c_int64(heads),
        rows,
        ctypes.byref(tiles),
    )
    assert library().why_not_tiles(ctypes.byref(tiles)) == b""
    return tiles


@pytest.mark.parametrize("head_dim", [64, 128])
def test_tensor_maps_are_what_the_copy_engine_takes(head_dim):
    q = inputs(300, (6, 2), head_dim)[0]
    args = TrieAttentionArgs(300, 6, 2, head_dim)
    for rows in {64, *(rows for rows, _ in streams(library(), head_dim))}:
        tiles = copyable(args, q, 6, rows)
        assert (tiles.element, tiles.swizzle, tiles.rank) == (9, 3, 3)
        assert tiles.address == q.data_ptr()
        assert tiles.sizes[:3] == [head_dim, 6, 300]
        assert tiles.strides[1:3] == [head_dim * 2, 6 * head_dim * 2]
        assert tiles.box[:3] == [64, 1, rows]


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),  # heads first
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),  # rows not in one piece
        lambda x: torch.ones((), dtype=x.dtype).expand(x.shape),  # what out.sum() sends back
        lambda x: torch.cat([x, x], 2)[..., 4 : 4 + x.shape[2]],  # not on 16 bytes
        lambda x: torch.cat([x, x], 2)[..., : x.shape[2] + 4].contiguous()[..., : x.shape[2]],
    ],
)
def test_views_that_the_copy_engine_does_not_take_are_copied(view):
    x = view(inputs(20, (3, 1), 64)[0])
    copy = cuda_attention._for_bulk_copies(x)
    assert copy is not x and torch.equal(copy, x)
    copyable(TrieAttentionArgs(20, 3, 1, 64), copy, 3, 64)


def test_strides_of_single_heads_and_tokens_do_not_matter():
    one = inputs(1, (1, 1), 64)[0]
    strided = one.as_strided(one.shape, (7, 3, 1))
    assert cuda_attention._for_bulk_copies(strided) is strided
    copyable(TrieAttentionArgs(1, 1, 1, 64), strided, 1, 64)


def test_shared_memory_fits_a_hopper_block():
    for head_dim in (64, 128):
        found = (ctypes.c_int * 3)()
        args = TrieAttentionArgs(1, 1, 1, head_dim, 132)
        library().shared_bytes_of(ctypes.byref(args), found)
        assert all(0 < shared <= SHARED_LIMIT for shared in found)
