"""A trie in several passes: what they hold, what they cost, and that they add up to the whole."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from tests.kernels.tries import node_prefixes, random_paths, real_trees
from tests.peak_memory import peak_tensor_bytes
from tests.train.groups import random_group
from tests.train.test_policy_loss import assert_same, gradients, tiny_model
from threadweaver.model import ATTENTION, trie_logprobs, trie_loss
from threadweaver.train.passes import Pass, split
from threadweaver.train.policy_batch import PolicyTrie, policy_group
from threadweaver.train.policy_loss import PolicyConfig, PolicyLoss, policy_loss
from tw_kernels import Trie


def random_trie(seed: int, roots: int = 3, branches: int = 8, length: int = 12) -> Trie:
    """A forest with a weight a token, some of them 0."""
    rng = np.random.default_rng(seed)
    paths = random_paths(rng, roots, branches, length)
    trie = Trie.from_paths(paths, [[0.0] * len(path) for path in paths])
    trie.columns["weights"] = torch.from_numpy(rng.integers(0, 3, len(trie)).astype(np.float32))
    return trie


def longest_path(trie: Trie) -> int:
    return int(trie.positions.max()) + 1


def computed(passes: list[Pass]) -> int:
    return sum(map(len, passes))


def fewest_tokens(trie: Trie, most_tokens: int) -> int:
    """A bound below the tokens of any passes of the trie.

    The passes that hold token i have, below it, all tokens under it, each as often as it is held,
    and each pass has room for most_tokens less the tokens down to i.
    """
    room = max(most_tokens, longest_path(trie))
    parents, depths = trie.parents.tolist(), (trie.positions + 1).tolist()
    held, below = [1] * len(trie), [0] * len(trie)
    in_all = 0
    for i in reversed(range(len(trie))):
        if below[i]:
            held[i] = max(held[i], -(-below[i] // (room - depths[i])))
        if (parent := parents[i]) >= 0:
            held[parent] = max(held[parent], held[i])
            below[parent] += below[i] + held[i]
        else:
            in_all += below[i] + held[i]
    return in_all


TRIES = st.builds(
    random_trie, st.integers(0, 10**6), st.integers(1, 4), st.integers(0, 12), st.integers(1, 12)
)
BUDGETS = st.integers(1, 80)


@given(TRIES, BUDGETS)
def test_every_token_is_owned_by_one_pass_and_none_is_larger_than_it_must_be(trie, budget):
    passes = split(trie, budget)
    owned = torch.cat([part.nodes[part.owned] for part in passes])
    assert sorted(owned.tolist()) == list(range(len(trie)))
    assert max(map(len, passes)) <= max(budget, longest_path(trie))
    assert all(part.owned.any() for part in passes)


@given(TRIES, BUDGETS)
def test_a_pass_is_the_trie_of_whole_paths_of_the_trie(trie, budget):
    prefixes = node_prefixes(trie)
    for part in split(trie, budget):
        assert node_prefixes(part.trie) == [prefixes[i] for i in part.nodes]
        ends, got = trie.subtree_ends, part.trie
        leaves = [i for i in part.nodes.tolist() if ends[i] == i + 1]
        want = Trie.from_paths([prefixes[i] for i in leaves])
        for name in ("tokens", "positions", "parents", "subtree_ends"):
            a, b = getattr(got, name), getattr(want, name)
            assert a.dtype == b.dtype and torch.equal(a, b)
        got.layout()  # which checks it


@given(TRIES, BUDGETS)
def test_weights_and_paths_go_to_the_pass_that_owns_them_and_to_no_other(trie, budget):
    passes = split(trie, budget)
    weights, paths = torch.zeros(len(trie)), []
    for part in passes:
        assert not part.trie.columns["weights"][~part.owned].any()
        weights[part.nodes] += part.trie.columns["weights"]
        ends = part.trie.path_ends
        assert ends.dtype == torch.int32 and part.owned[ends.long()].all()
        paths += [part.trie.tokens[part.trie.path_nodes(i)].tolist() for i in range(len(ends))]
    assert torch.equal(weights, trie.columns["weights"])
    assert sorted(paths) == sorted(
        trie.tokens[trie.path_nodes(i)].tolist() for i in range(trie.num_paths)
    )


@given(TRIES, BUDGETS)
def test_no_passes_have_fewer_tokens_than_the_bound(trie, budget):
    assert len(trie) <= fewest_tokens(trie, budget) <= computed(split(trie, budget))


def test_passes_come_near_the_fewest_tokens_that_there_can_be():
    tries = [*real_trees(0.1).values()]
    tries += [random_trie(seed, 1 + seed % 3, 60, 40) for seed in range(30)]
    ratios = [
        computed(split(trie, len(trie) // parts)) / fewest_tokens(trie, len(trie) // parts)
        for trie in tries
        for parts in (2, 4, 8)
    ]
    assert max(ratios) < 1.25 and sum(ratios) / len(ratios) < 1.02


def test_a_path_is_never_cut_and_the_pass_of_a_longer_one_is_as_long_as_it_is():
    chain = Trie.from_paths([range(30)])
    assert [len(part) for part in split(chain, 7)] == [30]
    [whole] = split(chain, 30)
    assert whole.trie is chain


def test_with_a_budget_of_one_the_longest_path_is_the_room():
    trie = Trie.from_paths([[0, 1, 2, 3], [0, 4], [0, 5], [0, 6], [7]])
    got = [part.trie.tokens.tolist() for part in split(trie, 1)]
    assert got == [[0, 1, 2, 3], [0, 4, 5, 6], [7]]


def test_the_largest_shared_prefix_stays_together():
    shared = [9, 8, 7, 6]
    paths = [[9, *tail] for tail in ([1] * 4, [2] * 4)] + [[*shared, t, t] for t in (1, 2)]
    got = [part.trie.tokens.tolist() for part in split(Trie.from_paths(paths), 9)]
    assert got == [[9, 1, 1, 1, 1, 2, 2, 2, 2], [9, 8, 7, 6, 1, 1, 2, 2]]


def test_small_trees_of_a_pack_share_a_pass():
    trees = [Trie.from_paths([[10 * i + j for j in range(n)]]) for i, n in enumerate((5, 2, 4, 3))]
    pack = Trie.pack(trees)
    assert sorted(len(part) for part in split(pack, 7)) == [7, 7]
    assert computed(split(pack, 7)) == len(pack)


def test_the_same_trie_is_split_the_same_way_each_time():
    a, b = (split(random_trie(5, branches=40), 60) for _ in range(2))
    assert [part.nodes.tolist() for part in a] == [part.nodes.tolist() for part in b]


def test_thousands_of_passes_and_branches_above_each_other_are_possible():
    wide = Trie.from_paths([[0, i] for i in range(1, 4_001)])
    deep = Trie.from_paths([[0] * i + [1] for i in range(1200)])
    for trie in (wide, deep):
        assert sum(int(part.owned.sum()) for part in split(trie, 1)) == len(trie)


def loss_gradients(model: PreTrainedModel, tries: list[Trie]) -> tuple[float, dict[str, Tensor]]:
    model.set_attn_implementation(ATTENTION)
    model.zero_grad()
    losses = [trie_loss(model, trie) for trie in tries]
    torch.stack(losses).sum().backward()
    return sum(float(loss.detach()) for loss in losses), gradients(model)


def random_vocabulary(trie: Trie) -> Trie:
    """The same trie of tokens that a tiny model has."""
    trie.tokens = trie.tokens % 128
    return trie


@settings(max_examples=8)
@given(st.integers(0, 10**6), st.integers(1, 80))
@example(seed=0, budget=1)
def test_losses_and_gradients_of_passes_add_up_to_those_of_the_whole(seed, budget):
    trie = random_vocabulary(random_trie(seed))
    model = tiny_model(0)
    want_loss, want = loss_gradients(model, [trie])
    loss, got = loss_gradients(model, [part.trie for part in split(trie, budget)])
    assert loss == pytest.approx(want_loss, rel=1e-6)
    assert_same(got, want)


def test_losses_and_gradients_of_a_real_tree_add_up():
    """In float64, but for norms and the loss: gradients differ by the rounding of those."""
    trie = random_vocabulary(real_trees(0.02)["sorting128ToT-1"])
    trie.columns["weights"] = torch.ones(len(trie))
    passes = split(trie, len(trie) // 4)
    assert len(passes) > 3
    model = tiny_model(0).double()
    want_loss, want = loss_gradients(model, [trie])
    loss, got = loss_gradients(model, [part.trie for part in passes])
    assert loss == pytest.approx(want_loss, rel=1e-6)
    assert_same(got, want, 1e-6)


@pytest.mark.slow
def test_the_smaller_the_passes_the_less_memory_a_step_takes():
    tree = random_vocabulary(real_trees(0.2)["docmergeToT-1"])
    tree.columns["weights"] = torch.ones(len(tree))
    model = tiny_model(0)
    trie_loss(model, Trie.from_paths([[7, 8]], [[1.0] * 2])).backward()  # gradients are there
    peaks = []
    for most in (len(tree), len(tree) // 2, len(tree) // 4):
        tries = [part.trie for part in split(tree, most)]

        def step(tries=tries):
            for trie in tries:
                trie_loss(model, trie).backward()

        peaks.append(peak_tensor_bytes(step))
    whole, half, quarter = peaks
    assert quarter < 0.7 * half < 0.7 * 0.7 * whole, peaks


@pytest.fixture(scope="module")
def batch() -> PolicyTrie:
    """Three prompts' rollouts, whose sampled tokens have advantages of both signs."""
    random = Random(4)
    groups = [random_group(random, 4, max_tokens=120, max_depth=1) for _ in range(3)]
    found = [policy_group(group, [0.6, -0.4, 0.3, -0.5], 10**6) for group in groups]
    return PolicyTrie.pack([trie for group in found for trie in group.tries])


def by_node(batch: PolicyTrie, values: Tensor) -> Tensor:
    whole = torch.full((len(batch),), torch.nan)
    whole[batch.sampled] = values
    return whole


def policy_gradients(
    model: PreTrainedModel, batch: PolicyTrie, parts: list[tuple[PolicyTrie, Tensor]]
) -> tuple[list[PolicyLoss], dict[str, Tensor]]:
    """Of passes, each with the flat indices of its tokens, under all that a policy loss can have;
    log-probabilities of the old and the reference policy are made up."""
    model.set_attn_implementation(ATTENTION)
    model.zero_grad()
    made_up = torch.Generator().manual_seed(0)
    old, reference = torch.rand(2, len(batch), generator=made_up) - 5.5
    config = PolicyConfig(kl=0.1, importance_cap=1.1, entropy=0.01)
    losses = []
    for part, nodes in parts:
        current = trie_logprobs(model, part.trie, part.trie.layout(), part.sampled, True)
        at = nodes[part.sampled]
        tokens = batch.num_completion_tokens
        losses.append(policy_loss(current, part, config, tokens, old[at], reference[at]))
        losses[-1].loss.backward()
    return losses, gradients(model)


@pytest.mark.parametrize("share", [2, 5, 10**6])
def test_clipped_policy_losses_with_kl_and_entropy_add_up(batch, share):
    model = tiny_model(0)
    [whole], want = policy_gradients(model, batch, [(batch, torch.arange(len(batch)))])
    most = max(1, len(batch) // share)
    nodes = [part.nodes for part in split(batch.trie, most)]
    parts = batch.split(most)
    assert all(len(part.sampled) for part in parts)
    losses, got = policy_gradients(model, batch, list(zip(parts, nodes, strict=True)))
    assert len(losses) > 1
    assert 0 < whole.clipped < batch.num_completion_tokens
    for name in ("loss", "clipped", "entropy", "kl", "mismatch"):
        total = sum(getattr(loss, name).item() for loss in losses)
        assert total == pytest.approx(getattr(whole, name).item(), rel=1e-5), name
    largest = max(loss.max_mismatch.item() for loss in losses)
    assert largest == pytest.approx(whole.max_mismatch.item(), rel=1e-5)
    assert_same(got, want)


def test_what_a_token_was_sampled_with_goes_to_its_owner_alone(batch):
    names = ("counts", "positive_counts", "negative_counts", "generator_logprobs")
    most = len(batch) // 4
    passes, parts = split(batch.trie, most), batch.split(most)
    for name in names:
        whole = by_node(batch, getattr(batch, name).float())
        got = torch.full((len(batch),), torch.nan)
        for part, policy in zip(passes, parts, strict=True):
            at = part.nodes[policy.sampled]
            assert got[at].isnan().all() and part.owned[policy.sampled].all()
            got[at] = getattr(policy, name).float()
        torch.testing.assert_close(got, whole, rtol=0, atol=0, equal_nan=True)
    advantages = zip(*(part.trie.columns.values() for part in parts), strict=True)
    for whole, found in zip(batch.trie.columns.values(), advantages, strict=True):
        total = torch.zeros(len(batch))
        for part, column in zip(passes, found, strict=True):
            total[part.nodes] += column
        assert torch.equal(total, whole)
