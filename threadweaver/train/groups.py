"""Groups of rollouts, each other's baseline, and the batch that is made of them
(docs/semantics.md, "P-GRPO")."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from threadweaver.evaluate.grade import Graded
from threadweaver.evaluate.reward import Reward


@dataclass(frozen=True, eq=False)
class Group:
    """The rollouts of one prompt, what each earned and how much better it is than the others."""

    graded: Sequence[Graded]
    rewards: Sequence[Reward]
    advantages: Sequence[float]

    @property
    def has_signal(self) -> bool:
        """Whether the rewards differ."""
        return any(self.advantages)

    @property
    def is_here(self) -> bool:
        """Whether this rank decoded them."""
        return all(g.rollout is not None for g in self.graded)

    @property
    def num_sampled_tokens(self) -> int:
        return sum(g.counts.num_sampled_tokens for g in self.graded)

    @property
    def source(self) -> str:
        return self.graded[0].problem.source


def sample_groups(sample: Callable[[int], Sequence[Group]], size: int, limit: int) -> list[Group]:
    """Samples `size` groups, and further ones until as many have a signal or `limit` times `size`
    groups are there (limit 1: no further ones). DAPO's dynamic sampling (arXiv 2503.14476).

    It asks for as many as it takes at the share with a signal seen so far, at most `size` at once.

    Args:
        sample: gives so many groups.
    """
    groups: list[Group] = []
    more = size
    while more > 0:
        groups += sample(more)
        with_signal = sum(group.has_signal for group in groups)
        expected = math.ceil((size - with_signal) * len(groups) / max(with_signal, 1))
        more = min(expected, size, limit * size - len(groups))
    return groups


def batch_of(groups: Sequence[Group], size: int) -> list[Group]:
    """The batch, in the order of `groups`: the first `size` that have a signal; if there are fewer,
    the first others fill it up."""
    chosen = sorted(range(len(groups)), key=lambda i: not groups[i].has_signal)[:size]
    return [groups[i] for i in sorted(chosen)]
