"""From the rewards of a prompt's rollouts to their advantages (docs/semantics.md, "P-GRPO")."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Literal

Advantage = Literal["mean", "std"]

# So that a group whose rewards hardly differ is not blown up without bound; verl's value.
EPSILON = 1e-6


def group_advantages(rewards: Sequence[float], advantage: Advantage = "mean") -> list[float]:
    """How much better each rollout of a group is than the group.

    "mean" is the reward less the group's mean (arXiv 2512.07843, P-GRPO). "std", GRPO's own and
    here an ablation, divides that by the group's standard deviation (n - 1 in the denominator).

    Returns:
        As many numbers as rewards. Rewards that are all equal give zeros exactly, so a group
        without signal is one for which any(advantages) is False.

    Raises:
        ValueError: a reward that is infinite or not a number; names the rollout.
    """
    for i, reward in enumerate(rewards):
        if not math.isfinite(reward):
            raise ValueError(f"rollout {i} of {len(rewards)}: its reward is {reward}")
    if len(set(rewards)) == 1:
        return [0.0] * len(rewards)
    mean = fmean(rewards)
    centred = [reward - mean for reward in rewards]
    if advantage == "mean":
        return centred
    scale = stdev(rewards) + EPSILON
    return [a / scale for a in centred]
