"""The optimizer steps of a batch, when its groups lie on several ranks."""

from __future__ import annotations

from random import Random

import pytest

from tests.train.groups import random_group
from threadweaver import ranks
from threadweaver.train.policy_batch import PolicyTrie, policy_group
from threadweaver.train.policy_parts import parts_of

MOST = 60


def random_batch(rng: Random) -> list[list[PolicyTrie]]:
    """Of groups: tries of each, none of one without a signal."""
    batch = []
    for _ in range(rng.randint(0, 6)):
        rollouts = random_group(rng, rng.randint(0, 4), max_tokens=40)
        advantages = [rng.choice([-1.0, 1.0]) for _ in rollouts]
        batch.append(policy_group(rollouts, advantages, MOST).tries)
    return batch


def tokens_of(tries: list[PolicyTrie]) -> list[int]:
    return sorted(token for trie in tries for token in trie.trie.tokens.tolist())


@pytest.mark.parametrize("seed", range(10))
def test_ranks_take_the_steps_of_one_process_with_as_many_passes_each(monkeypatch, seed):
    rng = Random(seed)
    batch, updates, size = random_batch(rng), rng.randint(1, 3), rng.randint(2, 4)
    owners = [rng.randrange(size) for _ in batch]
    all_tries = [trie for tries in batch for trie in tries]
    monkeypatch.setattr(ranks, "sums", lambda values: [len(tries) for tries in batch])
    alone = parts_of(batch, updates, MOST)
    assert len(alone) == min(updates, len(all_tries))
    for i, part in enumerate(alone):
        assert part.fillers == 0 and tokens_of(part.micros) == tokens_of(all_tries[i::updates])

    own = [
        [tries if owner == rank else [] for tries, owner in zip(batch, owners, strict=True)]
        for rank in range(size)
    ]
    together = [parts_of(groups, updates, MOST) for groups in own]
    for i, part in enumerate(alone):
        micros = [parts[i].micros for parts in together]
        assert tokens_of([m for of_rank in micros for m in of_rank]) == tokens_of(part.micros)
        most = max(map(len, micros))
        for groups, of_rank in zip(own, micros, strict=True):
            with monkeypatch.context() as patch:
                patch.setattr(ranks, "largest", lambda count, most=most: most)
                assert parts_of(groups, updates, MOST)[i].fillers == most - len(of_rank)


def test_a_filler_has_a_token_to_predict_that_counts_for_nothing():
    filler = PolicyTrie.filler(7)
    assert filler.trie.tokens.tolist() == [7, 7] and filler.sampled.tolist() == [1]
    assert filler.num_completion_tokens == 0
    assert not any(column.any() for column in filler.trie.columns.values())
