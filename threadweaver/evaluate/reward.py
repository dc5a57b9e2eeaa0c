"""The reward of a response: its correctness, and for a right one the length of its longest path.

Source: docs/semantics.md, "Reward" (Lian et al., arXiv 2512.07843).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from threadweaver.trajectory import PathLengths


@dataclass(frozen=True)
class RewardConfig:
    """What a right answer earns. A wrong one earns 0, however short.

    Args:
        accel: clipped: 1 + rho * min(acceleration, clip), where acceleration is the share of tokens
            off the longest path. latency: 1 - min(latency_cost * longest path, 1/2), which also
            rewards shorter responses. none: 1.
        rho: weight of the acceleration.
        clip: acceleration beyond which the reward does not rise.
        latency_cost: cost of a token of the longest path. Choose it so that common paths cost less
            than 1/2, where the cost is capped.
    """

    accel: Literal["clipped", "latency", "none"] = "clipped"
    rho: float = 0.5
    clip: float = 0.2
    latency_cost: float = 1e-5

    def __post_init__(self):
        for name in ("rho", "clip", "latency_cost"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} is {value}: it must be a number of at least 0")


@dataclass(frozen=True)
class Reward:
    """A reward and its parts.

    Attributes:
        correct: 1 if the answer is right, else 0.
        speed: what the length of the longest path adds: `clipped`, in [0, rho * clip]; `latency`,
            in [-1/2, 0]; 0 for a wrong answer.
    """

    correct: float
    speed: float

    @property
    def total(self) -> float:
        return self.correct + self.speed


# The most that a right answer can lose: it earns at least 1/2 more than a wrong one.
MAX_LATENCY_COST = 0.5


def reward(correct: float, lengths: PathLengths, config: RewardConfig, source: str) -> Reward:
    """r = c + c * rho * min(acceleration, clip), or what `config.accel` puts in its place.

    Args:
        correct: c, 0 or 1: whether the answer is right.
        lengths: of the response, by `threadweaver.trajectory.path_lengths`.
        source: of the problem, for the message.

    Raises:
        ValueError: c is neither 0 nor 1.
    """
    if correct not in (0, 1):
        raise ValueError(
            f"{source}: the correctness of a response is {correct}; it must be 0 or 1: "
            "correct the check of answers of this task"
        )
    speed = 0.0
    if correct and config.accel == "clipped":
        speed = config.rho * min(lengths.acceleration, config.clip)
    elif correct and config.accel == "latency":
        speed = -min(config.latency_cost * lengths.longest_path_tokens, MAX_LATENCY_COST)
    return Reward(float(correct), speed)
