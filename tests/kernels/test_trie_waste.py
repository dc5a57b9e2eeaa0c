"""Pairs that block schedules compute over those that are visible, and the grain that follows."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.shapes import pack, star
from tests.kernels.tries import random_layout, visible
from tw_kernels import TrieLayout
from tw_kernels.attention.cuda import FINE, OWN_ROWS, STREAMED_ROWS, fine_is_cheaper

COARSE = [(OWN_ROWS, 128), (OWN_ROWS, 64), (64, OWN_ROWS)]
PACK = pack(64, 512).trie.layout()
CHAIN = TrieLayout(torch.full((8192,), 8192, dtype=torch.int32))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), block_q=st.integers(1, 40), block_kv=st.integers(1, 40))
def test_waste_counts_the_blocks_that_hold_a_visible_pair(seed, block_q, block_kv):
    layout = random_layout(seed)
    i, j = np.nonzero(visible(layout.subtree_ends).numpy())
    blocks = len(set(zip(i // block_q, j // block_kv, strict=True)))
    assert layout.waste(block_q, block_kv) == blocks * block_q * block_kv / len(i)


def test_a_schedule_of_single_tokens_wastes_nothing():
    assert random_layout(0).waste(1, 1) == 1


@pytest.mark.parametrize(
    ("blocks", "of_pack", "of_chain"),
    [((128, 128), 0.516, 0.985), ((128, 64), 0.580, 0.985), ((64, 64), 0.7425, 0.992)],
)
def test_share_of_computed_pairs_that_is_visible(blocks, of_pack, of_chain):
    assert 1 / PACK.waste(*blocks) == pytest.approx(of_pack, abs=5e-4)
    assert 1 / CHAIN.waste(*blocks) == pytest.approx(of_chain, abs=5e-4)


@pytest.mark.parametrize("coarse", COARSE)
def test_packs_of_small_tries_take_fine_blocks_and_long_paths_coarse_ones(coarse):
    assert fine_is_cheaper(PACK, coarse)
    assert not fine_is_cheaper(CHAIN, coarse)
    assert not fine_is_cheaper(star(16384).trie.layout(), coarse)


def test_long_paths_build_no_schedule_of_fine_blocks():
    layout = TrieLayout(torch.full((2048,), 2048, dtype=torch.int32))
    assert not fine_is_cheaper(layout, (OWN_ROWS, 128))
    assert ("schedule", FINE, FINE, None) not in layout.memo


@pytest.mark.parametrize(("group", "fine"), [(1, False), (2, True), (3, False), (4, True)])
def test_heads_that_a_block_of_two_computes_twice_count_as_waste(group, fine):
    heads = (group + group % 2) / group
    assert fine_is_cheaper(PACK, (OWN_ROWS, STREAMED_ROWS[128][0]), heads) == fine
