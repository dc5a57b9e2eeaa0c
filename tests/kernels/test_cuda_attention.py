"""The CUDA trie attention kernels without a GPU, emulated on the CPU (cuda_emulation.py)."""

import ctypes

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.cuda_emulation import GRAINS, EmulatedGpu, attention
from tests.kernels.rounding import gradient_terms
from tests.kernels.tries import oracle, random_paths, real_trees, visible
from tw_kernels import Trie, TrieLayout
from tw_kernels.attention import cuda as cuda_attention

ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # of a result
EXACT = 1e-6  # what the float32 of lse, lse2 and delta leaves of a double
in_both_grains = pytest.mark.parametrize("grain", GRAINS)


def inputs(
    n: int,
    heads: tuple[int, int],
    head_dim: int,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> list[Tensor]:
    """q, k, v, dout."""
    generator = torch.Generator().manual_seed(seed)
    counts = (heads[0], heads[1], heads[1], heads[0])
    return [torch.randn(n, h, head_dim, generator=generator).to(dtype) for h in counts]


def gradients(tensors: list[Tensor], out: Tensor, lse: Tensor, mask: Tensor, scale) -> list[Tensor]:
    """dq, dk, dv in float64 by the formulas of trie_attention_bwd.cu, from this out."""
    group = tensors[0].shape[1] // tensors[1].shape[1]
    q, k, v, dout = (x.double() for x in tensors)
    k_of, v_of = (x.repeat_interleave(group, 1) for x in (k, v))
    p = (torch.einsum("ihd,jhd->hij", q, k_of) * scale - lse.double()[:, :, None]).exp() * mask
    delta = (dout * out.double()).sum(-1).T
    ds = p * (torch.einsum("ihd,jhd->hij", dout, v_of) - delta[:, :, None])
    dq = torch.einsum("hij,jhd->ihd", ds, k_of) * scale
    dk = torch.einsum("hij,ihd->jhd", ds, q) * scale
    dv = torch.einsum("hij,ihd->jhd", p, dout)
    return [dq, *(x.unflatten(1, (-1, group)).sum(2) for x in (dk, dv))]


@pytest.fixture(scope="module")
def gpu():
    return EmulatedGpu()


def assert_equals_the_definition(
    gpu, layout, tensors: list[Tensor], grain: str, multiprocessors: int
) -> None:
    scale = tensors[0].shape[2] ** -0.5
    out, lse, *grads = gpu(attention, layout.subtree_ends, tensors, scale, grain, multiprocessors)
    roundoff = ROUNDOFF[out.dtype]
    least = torch.finfo(out.dtype).smallest_normal * roundoff  # below it errors are absolute
    mask = visible(layout.subtree_ends)
    q, k, v, _ = tensors
    want_out, want_lse = oracle(q, k, v, mask, scale)
    torch.testing.assert_close(lse.double(), want_lse, rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(out.double(), want_out, rtol=roundoff, atol=EXACT)
    want = gradients(tensors, out, lse, mask, scale)
    for got, x, terms in zip(grads, want, gradient_terms(tensors, mask, scale), strict=True):
        assert ((got.double() - x).abs() <= roundoff * x.abs() + least + EXACT * terms).all()


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    roots=st.integers(1, 4),
    branches=st.sampled_from([0, 2, 12]),
    length=st.sampled_from([3, 40, 120]),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    head_dim=st.sampled_from([64, 128]),
    dtype=st.sampled_from([*ROUNDOFF]),
    grain=st.sampled_from([*GRAINS]),
    multiprocessors=st.sampled_from([1, 2, 132]),
)
def test_random_forests_agree_with_the_definition(
    gpu, seed, roots, branches, length, kv_heads, group, head_dim, dtype, grain, multiprocessors
):
    paths = random_paths(np.random.default_rng(seed), roots, branches, length)
    layout = Trie.from_paths(paths).layout()
    heads = kv_heads * group, kv_heads
    tensors = inputs(layout.num_tokens, heads, head_dim, seed % 997, dtype)
    assert_equals_the_definition(gpu, layout, tensors, grain, multiprocessors)


@pytest.mark.parametrize("n", [1, 63, 64, 65, 127, 128, 129, 191, 192, 256])
@pytest.mark.parametrize("head_dim", [64, 128])
@in_both_grains
def test_ragged_last_tiles(gpu, n, head_dim, grain):
    layout = TrieLayout(torch.full((n,), n, dtype=torch.int32))
    assert_equals_the_definition(gpu, layout, inputs(n, (1, 1), head_dim), grain, 2)


@in_both_grains
def test_rows_that_see_nothing_of_their_first_tiles(gpu, grain):
    # Three blocks of 128 rows behind a root of 100 tokens, which most of them do not descend from.
    layout = Trie.pack([Trie.from_paths([list(range(n))]) for n in (100, 1, 60, 223)]).layout()
    assert_equals_the_definition(gpu, layout, inputs(384, (1, 1), 64), grain, 1)


@pytest.mark.parametrize("task", sorted(real_trees(0.01))[::5])
@in_both_grains
def test_real_trees(gpu, task, grain):
    layout = real_trees(0.015)[task].layout()
    assert_equals_the_definition(gpu, layout, inputs(layout.num_tokens, (2, 1), 64), grain, 3)


@pytest.mark.parametrize(
    ("view", "is_copied"),
    [
        (lambda x: torch.cat([x, x], 1)[:, : x.shape[1]], False),  # of one projection
        (lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), True),  # heads first
        (lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), True),  # rows not in one piece
        (lambda x: F.pad(x, (4, 60))[..., 4:-60], True),  # not on 16 bytes
        (lambda x: F.pad(x, (0, 4))[..., :-4], True),
    ],
)
def test_strides_do_not_matter(gpu, view, is_copied):
    tensors = inputs(150, (4, 2), 64)
    ends = torch.full((150,), 150, dtype=torch.int32)
    views = [view(x) for x in tensors]
    assert all((cuda_attention._for_bulk_copies(x) is not x) == is_copied for x in views)
    got, want = gpu(attention, ends, views, 0.1), gpu(attention, ends, tensors, 0.1)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_strides_of_single_heads_and_tokens_do_not_matter(gpu):
    one = inputs(1, (1, 1), 64)
    strided = [x.as_strided(x.shape, (7, 3, 1)) for x in one]
    assert all(cuda_attention._for_bulk_copies(x) is x for x in strided)
    ends = torch.ones(1, dtype=torch.int32)
    got, want = gpu(attention, ends, strided, 0.1), gpu(attention, ends, one, 0.1)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_gradient_without_strides_is_copied():
    dout = torch.ones((), dtype=torch.bfloat16).expand(20, 3, 64)  # what out.sum() sends back
    assert cuda_attention._for_bulk_copies(dout).is_contiguous()


def tiles_taken(rounds: int, blocks: int) -> list[list[int]]:
    """By each block, in an EmulatedGpu."""
    tile_of = ctypes.CDLL("libcuda.so.1").tile_of_round
    return [[tile_of(r, blocks, b) for r in range(rounds)] for b in range(blocks)]


@settings(deadline=None)
@given(
    work=st.lists(st.integers(1, 50), min_size=1, max_size=200),
    blocks=st.integers(1, 40),
)
def test_the_persistent_grid_takes_every_tile_once_and_is_balanced_to_one_tile(gpu, work, blocks):
    work = sorted(work, reverse=True)
    blocks = min(blocks, len(work))
    taken = gpu(tiles_taken, -(-len(work) // blocks), blocks)
    # A block stops at its first tile beyond the last: that must be in the last round.
    assert all(t < len(work) for tiles in taken for t in tiles[:-1])
    done = [[t for t in tiles if t < len(work)] for tiles in taken]
    assert sorted(t for tiles in done for t in tiles) == list(range(len(work)))
    loads = [sum(work[t] for t in tiles) for tiles in done]
    assert max(loads) - min(loads) <= work[0]
