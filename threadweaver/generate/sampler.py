"""From logits to tokens: temperature, truncation, and draws that depend on their key alone.

The random number of a token is a hash of its key (seed, request, position), so a draw does not
depend on the rest of the batch, the schedule or the device; the op is tw_kernels.sampling.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tw_kernels.sampling import Draws, SamplingRows, sample_tokens
from tw_kernels.sampling.rows import MIX1, MIX2, STEP, Settings

_WORD = 2**64


@dataclass(frozen=True)
class SamplingParams:
    """How a token is drawn. Truncations apply in this order, each to the result of the last.

    Args:
        temperature: divides the logits; 0 takes the likeliest token, and so does whatever is close
            to 0, down to the smallest float (equally likely ones are drawn from).
        top_k: only the k likeliest tokens; null: all.
        top_p: only the likeliest tokens, as many as it takes to hold this probability.
        min_p: only tokens at least this fraction as likely as the likeliest.

    Raises:
        ValueError: a setting out of range; names it.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature is {self.temperature}: it must be at least 0")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}: it must be at least 1")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: it must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}: it must be from 0 to 1")

    @cached_property
    def settings(self) -> Settings:
        """As the op takes them."""
        return Settings.of(self.temperature, self.top_k, self.top_p, self.min_p)


def stream_key(numbers: Iterable[int]) -> int:
    """A 64-bit hash of the numbers that name a stream of draws, such as a seed and request id."""
    state = 0
    for number in numbers:
        state = _mix((state ^ (number % _WORD)) + STEP)
    return state


def _mix(z: int) -> int:
    z %= _WORD
    z = (z ^ (z >> 30)) * MIX1 % _WORD
    z = (z ^ (z >> 27)) * MIX2 % _WORD
    return z ^ (z >> 31)


def sample(
    logits: Tensor,
    params: Sequence[SamplingParams],
    u: NDArray[np.float64],
    forced: Sequence[int | None] | None = None,
) -> Draws:
    """Draws a token for each row.

    Args:
        logits: [S, V].
        params: of each row.
        u: a uniform number in [0, 1) for each row, the point in its cumulative distribution.
        forced: tokens to take instead of the drawn ones, None where there is none; the
            log-probabilities are theirs (-inf for one that truncation excludes).
    """
    nothing = [0] * len(params)
    rows = SamplingRows.build(nothing, nothing, [p.settings for p in params], forced)
    rows.data = rows.data.to(logits.device)
    points = torch.from_numpy(u).to(logits.device)
    return Draws.unpack(sample_tokens(logits, rows, points))
