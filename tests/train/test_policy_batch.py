"""Policy tries against their definition, spelled out over prefixes."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.generate.rollouts import randoms, unhurried
from tests.kernels.tries import node_prefixes
from tests.train.groups import (
    PROMPT,
    Prefix,
    made_up_logprob,
    random_group,
    sampled_prefixes,
)
from threadweaver.generate.rollout import Completion, Rollout
from threadweaver.generate.weaver import LimitCounts
from threadweaver.train.policy_batch import PolicyTrie, micro_batches, policy_group

UNLIMITED = 10**6
ADVANTAGES = [0.3, -0.2, 0.05, -0.15, 0.0]


@st.composite
def groups(draw: st.DrawFn) -> list[Rollout]:
    return random_group(
        draw(randoms),
        draw(st.integers(1, 5)),
        max_tokens=draw(st.sampled_from([400, 120, 30])),
        max_depth=draw(st.integers(1, 2)),
        max_thread_tokens=draw(st.sampled_from([None, 40])),
    )


def policy_tries(rollouts, max_tokens=UNLIMITED):
    return policy_group(rollouts, ADVANTAGES[: len(rollouts)], max_tokens)


@unhurried
@given(groups())
def test_a_rollout_samples_no_token_twice(rollouts):
    for rollout in rollouts:
        sampled = [p for completion in rollout.completions for p in sampled_prefixes(completion)]
        assert len(sampled) == len(set(sampled)) == rollout.num_sampled_tokens


@unhurried
@given(groups())
def test_a_token_weighs_once_for_each_rollout_that_sampled_it(rollouts):
    samplers: dict[Prefix, list[float]] = {}
    for rollout, advantage in zip(rollouts, ADVANTAGES, strict=False):
        for completion in rollout.completions:
            for prefix in sampled_prefixes(completion):
                samplers.setdefault(prefix, []).append(advantage)
    tries, *cut = policy_tries(rollouts)
    assert cut == [0, 0]
    if not samplers:
        assert tries == []
        return
    [got] = tries
    prefixes = node_prefixes(got.trie)
    assert len(set(prefixes)) == len(prefixes)
    assert [prefixes[at] for at in got.sampled] == [p for p in prefixes if p in samplers]
    assert len(got.sampled) == len(samplers)
    at = got.sampled
    for i, prefix in enumerate(prefixes[a] for a in at):
        weights = samplers[prefix]
        assert got.counts[i] == len(weights)
        assert got.positive_counts[i] == sum(w > 0 for w in weights)
        assert got.negative_counts[i] == sum(w < 0 for w in weights)
        assert got.trie.columns["positive_advantages"][at[i]].item() == pytest.approx(
            sum(w for w in weights if w > 0), abs=1e-6
        )
        assert got.trie.columns["negative_advantages"][at[i]].item() == pytest.approx(
            sum(w for w in weights if w < 0), abs=1e-6
        )
        assert got.generator_logprobs[i].item() == pytest.approx(made_up_logprob(prefix), abs=1e-6)
    assert got.num_completion_tokens == sum(r.num_sampled_tokens for r in rollouts)
    others = torch.ones(len(got), dtype=torch.bool)
    others[at] = False
    assert not got.trie.columns["positive_advantages"][others].any()
    assert not got.trie.columns["negative_advantages"][others].any()


def calls_of(rollout: Rollout) -> list[Completion]:
    return [completion for completion in rollout.completions if completion.tokens]


def path_prefixes(calls: list[Completion]) -> set[Prefix]:
    paths = [tuple(call.context + call.tokens) for call in calls]
    return {path[: i + 1] for path in paths for i in range(len(path))}


@unhurried
@given(groups(), st.data())
def test_the_budget_cuts_whole_calls_off_the_end_and_divides_no_rollout(rollouts, data):
    calls = [calls_of(rollout) for rollout in rollouts]
    budget = data.draw(st.integers(1, 2 * max(len(path_prefixes(c)) for c in calls) + 1))
    kept = [
        max((c[:n] for n in range(len(c) + 1) if len(path_prefixes(c[:n])) <= budget), key=len)
        for c in calls
    ]
    got = policy_tries(rollouts, budget)
    assert all(len(trie) <= budget for trie in got.tries)
    cut = [(len(c), len(k)) for c, k in zip(calls, kept, strict=True)]
    assert got.skipped_rollouts == sum(k == 0 < c for c, k in cut)
    assert got.dropped_calls == sum(c - k for c, k in cut if k)
    assert sum(trie.num_completion_tokens for trie in got.tries) == sum(
        len(call.tokens) for k in kept for call in k
    )
    # Tries hold the kept rollouts in order: each as many as fit, the next one begins another.
    waiting = [k for k in kept if k]
    for trie in got.tries:
        prefixes = set(node_prefixes(trie.trie))
        num_paths = 0
        while waiting and len(prefixes | path_prefixes(waiting[0])) <= budget:
            assert path_prefixes(waiting[0]) <= prefixes
            num_paths += len(waiting.pop(0))
        assert trie.trie.num_paths == num_paths
    assert not waiting


@unhurried
@given(st.lists(groups(), min_size=1, max_size=4), st.integers(30, 500))
def test_micro_batches_hold_every_trie_once_within_the_budget(batch, budget):
    tries = [trie for rollouts in batch for trie in policy_tries(rollouts, budget).tries]
    packs = micro_batches(tries, budget)
    assert all(len(p) <= budget for p in packs)
    assert sum(map(len, packs)) == sum(map(len, tries))
    assert sampled_tokens(packs) == sampled_tokens(tries)


def sampled_tokens(tries: list[PolicyTrie]) -> Counter:
    """All that is known of each, tokens of different tries told apart by nothing else."""
    rows = Counter()
    for policy in tries:
        prefixes = node_prefixes(policy.trie)
        columns = (
            policy.trie.columns["positive_advantages"][policy.sampled],
            policy.trie.columns["negative_advantages"][policy.sampled],
            policy.counts,
            policy.positive_counts,
            policy.negative_counts,
            policy.generator_logprobs,
        )
        at = [prefixes[i] for i in policy.sampled]
        rows.update(zip(at, *(column.tolist() for column in columns), strict=True))
    return rows


def one_call(tokens: list[int], logprobs: list[float]) -> Rollout:
    completion = Completion((0,), PROMPT, tokens, logprobs, logprobs, "stop")
    return Rollout(PROMPT, tokens, [completion], LimitCounts(), 1)


def test_advantages_of_opposite_sign_are_kept_apart_on_a_shared_prefix():
    one, other = one_call([1, 2, 3], [-1.0, -2.0, -3.0]), one_call([1, 2], [-1.1, -2.0])
    [got], _, _ = policy_group([one, other], [0.5, -0.25], UNLIMITED)
    at = got.sampled
    assert got.trie.tokens[at].tolist() == [1, 2, 3]
    assert got.trie.columns["positive_advantages"][at].tolist() == [0.5, 0.5, 0.5]
    assert got.trie.columns["negative_advantages"][at].tolist() == [-0.25, -0.25, 0.0]
    assert got.counts.tolist() == [2, 2, 1]
    assert got.positive_counts.tolist() == [1, 1, 1]
    assert got.negative_counts.tolist() == [1, 1, 0]
    assert got.generator_logprobs.tolist() == pytest.approx([-1.05, -2.0, -3.0])


def test_a_rollout_that_got_nothing_is_neither_skipped_nor_cut():
    assert policy_group([one_call([], [])], [1.0], UNLIMITED) == ([], 0, 0)


def test_one_advantage_for_each_rollout():
    with pytest.raises(ValueError, match="shorter"):
        policy_group(random_group(Random(0), 2, max_tokens=50), [1.0], UNLIMITED)
