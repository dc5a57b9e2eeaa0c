"""Shares and means over problems, with 95 % confidence intervals.

The problem is the unit everywhere: several responses to one problem are not independent, so they
count as one observation, their mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_Z = 1.959964  # two-sided 95 % of the normal distribution
_RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % confidence interval."""

    value: float
    low: float
    high: float


def share(shares: NDArray[np.float64]) -> Estimate:
    """Mean of one share in [0, 1] for each problem, [P]; Wilson's interval (1927) for P trials.

    Several responses to a problem count as one trial, so that the interval is rather too wide.
    """
    n, p = len(shares), float(np.mean(shares))
    center = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    # At a share of 0 or 1 the interval ends there exactly.
    return Estimate(p, min(max(0.0, center - half), p), max(min(1.0, center + half), p))


def ratio(numerators: NDArray[np.float64], denominators: NDArray[np.float64]) -> Estimate | None:
    """Sum of numerators over sum of denominators, one each a problem, [P]; None if the latter is 0.

    The interval holds the middle 95 % of the ratios of 2000 bootstrap resamples of the problems,
    drawn with a fixed seed.
    """
    if not denominators.sum():
        return None
    n = len(numerators)
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(_RESAMPLES):
        counts = np.bincount(rng.integers(n, size=n), minlength=n)
        below = counts @ denominators
        if below:
            ratios.append(counts @ numerators / below)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return Estimate(float(numerators.sum() / denominators.sum()), float(low), float(high))
