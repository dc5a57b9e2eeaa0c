"""What each row of a batch is drawn by: its random number, temperature, truncation, forced token.

Data alone, which the op and its backends take.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Of SplitMix64 (Steele, Lea, Flood 2014).
STEP, MIX1, MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
WHOLE = 2**40  # the weight of the likeliest token
MOST_TOKENS = 2**22  # of a vocabulary: the sum of all weights is below 2^63
COLD = 1e-3  # below this temperature a logit divided by it may overflow
_HOT = 1 / float(np.finfo(np.float32).tiny)  # beyond it all that are finite are alike


class Column(IntEnum):
    """Of SamplingRows.data."""

    KEY = 0  # of the row's stream of random numbers, uint64
    POSITION = 1  # in that stream
    FORCED = 2  # the token to take instead of a drawn one; -1: none
    TEMPERATURE = 3  # the bits of a float32; 0: take the likeliest
    TOP_K = 4  # 0: all
    TOP_P = 5  # the bits of a float64; 1: all
    MIN_WEIGHT = 6  # tokens of less are cut off


class Settings(NamedTuple):
    """The columns TEMPERATURE to MIN_WEIGHT."""

    temperature: int
    top_k: int
    top_p: int
    min_weight: int

    @classmethod
    def of(cls, temperature: float, top_k: int | None, top_p: float, min_p: float) -> Settings:
        """Of values in range (threadweaver.generate.sampler.SamplingParams)."""
        # The divisor and its inverse, by which a GPU multiplies, are normal float32 numbers.
        divisor = min(max(temperature, 1 / _HOT), _HOT) if temperature else 0.0
        return cls(
            int(np.float32(divisor).view(np.int32)),
            min(top_k or 0, MOST_TOKENS),
            int(np.float64(top_p).view(np.int64)),
            math.ceil(min_p * WHOLE),
        )

    @property
    def divisor(self) -> float:
        """What logits are divided by; 0: the likeliest token is taken."""
        return float(np.int32(self.temperature).view(np.float32))

    @property
    def mass(self) -> float:
        """top_p."""
        return float(np.int64(self.top_p).view(np.float64))

    @property
    def truncates(self) -> bool:
        return bool(self.temperature) and (self.top_k > 0 or self.mass < 1 or self.min_weight > 0)


@dataclass(eq=False)
class SamplingRows:
    """One row for each row of logits.

    Attributes:
        data: int64 [S, 7], by Column.
        truncates: whether some row cuts tokens off. Where none does, a GPU has one kernel less.
    """

    data: Tensor
    truncates: bool

    @classmethod
    def build(
        cls,
        keys: Sequence[int],
        positions: Sequence[int],
        settings: Sequence[Settings],
        forced: Sequence[int | None] | None = None,
    ) -> SamplingRows:
        """On the CPU.

        Args:
            keys: below 2^64.
            forced: tokens to take instead of drawn ones, None where there is none.
        """
        data = np.empty((len(keys), len(Column)), np.int64)
        data[:, Column.KEY] = np.array(keys, np.uint64).view(np.int64)
        data[:, Column.POSITION] = positions
        data[:, Column.FORCED] = [-1 if t is None else t for t in forced] if forced else -1
        kinds = {s: i for i, s in enumerate(dict.fromkeys(settings))}  # few, for many rows
        if kinds:
            table = np.array([*kinds], np.int64)
            data[:, Column.TEMPERATURE :] = table[[kinds[s] for s in settings]]
        return cls(torch.from_numpy(data), any(s.truncates for s in kinds))


def uniforms(keys: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.float64]:
    """One number in [0, 1 - 2^-52] for each (stream key, position), [S]: SplitMix64's output."""
    z = keys + (positions + np.uint64(1)) * np.uint64(STEP)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(MIX1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(MIX2)
    z ^= z >> np.uint64(31)
    return (z >> np.uint64(12)).astype(np.float64) * 2.0**-52
