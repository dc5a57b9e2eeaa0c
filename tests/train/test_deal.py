"""Micro-batches are dealt to ranks so that none waits long for another."""

import random
from itertools import pairwise

import pytest

from tests.train.conftest import ARCH
from threadweaver.model import build_tokenizer, new_model
from threadweaver.train.deal import Cost, deal
from tw_kernels import Trie


@pytest.mark.parametrize("num_ranks", [2, 3, 8])
@pytest.mark.parametrize("count", [1, 7, 8, 64])
def test_every_micro_batch_is_dealt_once_and_each_rank_has_as_many(num_ranks, count):
    rng = random.Random(count)
    costs = [rng.lognormvariate(0, 1) for _ in range(count)]
    dealt = deal(costs, num_ranks)
    assert sorted(i for mine in dealt.of_ranks for i in mine) == list(range(count))
    sizes = [len(mine) for mine in dealt.of_ranks]
    assert max(sizes) == dealt.passes and max(sizes) - min(sizes) <= 1


def test_what_runs_at_the_same_time_is_alike_and_the_dearest_comes_first():
    rng = random.Random(0)
    costs = [rng.random() for _ in range(24)]
    rows = list(zip(*deal(costs, 4).of_ranks, strict=True))
    for earlier, later in pairwise(rows):
        assert min(costs[i] for i in earlier) >= max(costs[i] for i in later)


def test_ranks_have_about_the_same_to_do():
    rng = random.Random(0)
    costs = [rng.uniform(0.5, 1) for _ in range(64)]
    dealt = deal(costs, 8)
    totals = [sum(costs[i] for i in mine) for mine in dealt.of_ranks]
    assert max(totals) <= 1.01 * sum(totals) / 8
    assert 1 <= dealt.imbalance < 1.1


def test_the_imbalance_is_what_waiting_costs():
    assert deal([3.0, 1.0], 2).imbalance == 1.5  # 3 in place of 2
    # In order of cost, 4 beside 3 and 2 beside 1: 6 in place of 5, though both ranks have 5 to do.
    dealt = deal([1.0, 2.0, 3.0, 4.0], 2)
    assert dealt.of_ranks == [[3, 0], [2, 1]] and dealt.imbalance == 6 / 5


def test_one_rank_keeps_the_order():
    assert deal([1.0, 3.0, 2.0], 1).of_ranks == [[0, 1, 2]]


def test_a_trie_costs_its_tokens_and_the_pairs_that_see_each_other():
    model = new_model(build_tokenizer(), ARCH)
    cost = Cost(model)
    parameters = sum(p.numel() for p in model.parameters())
    trie = Trie.from_paths([[1, 2, 3], [1, 2, 4, 5]])
    pairs = trie.layout().visible_pairs
    of_pair = 14 * ARCH["num_hidden_layers"] * ARCH["num_attention_heads"] * ARCH["head_dim"]
    assert cost(trie) == 6 * parameters * len(trie) + of_pair * pairs
    assert cost(Trie.pack([trie, trie])) == 2 * cost(trie)
