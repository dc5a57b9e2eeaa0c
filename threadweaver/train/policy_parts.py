"""What each optimizer step of a batch computes: its tries, on the ranks that decoded them
(docs/semantics.md, "P-GRPO")."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

from threadweaver import ranks
from threadweaver.train.policy_batch import PolicyTrie, micro_batches
from tw_kernels import Trie


class Part(NamedTuple):
    """One optimizer step, as far as this rank is concerned.

    Attributes:
        micros: its micro-batches.
        fillers: passes for nothing that follow, as many as other ranks have micro-batches more.
    """

    micros: list[PolicyTrie]
    fillers: int


def parts_of(
    groups: Sequence[Sequence[PolicyTrie]],
    updates: int,
    max_tokens: int,
    pass_tokens: int | None = None,
) -> list[Part]:
    """At most `updates` parts: of all tries, in the order of the groups, the first, the
    `updates`-th after it and so on; then those from the second on. All ranks call it together.

    Args:
        groups: the tries of each group of the batch; empty of one that another rank decoded.
        max_tokens: of a micro-batch.
        pass_tokens: of a part of one (`PolicyTrie.split`), which then stands for a micro-batch;
            None: they are not split.
    """
    counts = [int(count) for count in ranks.sums([len(tries) for tries in groups])]
    starts = accumulate(counts, initial=0)
    numbered = [
        (start + i, trie)
        for start, tries in zip(starts, groups, strict=False)
        for i, trie in enumerate(tries)
    ]
    parts = []
    for first in range(min(updates, sum(counts))):
        tries = [trie for number, trie in numbered if number % updates == first]
        micros = micro_batches(tries, max_tokens)
        if pass_tokens is not None:
            micros = [part for micro in micros for part in micro.split(pass_tokens)]
        parts.append(Part(micros, ranks.largest(len(micros)) - len(micros)))
    return parts


def imbalance(parts: Sequence[Part], cost: Callable[[Trie], float]) -> float:
    """Time that the passes take over that of ranks that never wait, by their costs; at least 1. All
    ranks call it."""
    own = [[cost(micro.trie) for micro in micros] + [0.0] * more for micros, more in parts]
    of_ranks = ranks.gather([cost for part in own for cost in part])
    mean = sum(map(sum, of_ranks)) / len(of_ranks)
    return sum(map(max, zip(*of_ranks, strict=True))) / mean if mean else 1.0
