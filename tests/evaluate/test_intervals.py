"""Shares and ratios: known values, coverage, and what the unit is."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from threadweaver.evaluate.intervals import ratio, share


def test_wilson_values_of_the_literature():
    # Newcombe (1998), "Two-sided confidence intervals for the single proportion", table I.
    for right, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605)):
        estimate = share(np.array([1.0] * right + [0.0] * (n - right)))
        assert estimate.value == right / n
        assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=1e-4)
    assert share(np.zeros(20)).low == 0 and share(np.zeros(20)).high == pytest.approx(0.1611, 1e-3)
    assert share(np.ones(29)).high == 1 and share(np.ones(29)).low == pytest.approx(0.8830, 1e-4)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=50))
def test_a_share_lies_in_its_interval_and_that_in_0_to_1(shares):
    estimate = share(np.array(shares))
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1


def test_a_mean_lies_in_the_interval_of_the_normal_distribution():
    values = np.random.default_rng(1).normal(10, 2, 400)
    estimate = ratio(values, np.ones(400))
    assert estimate is not None and estimate.value == pytest.approx(values.mean())
    half = 1.96 * values.std() / 20
    assert estimate.low == pytest.approx(estimate.value - half, abs=0.15 * half)
    assert estimate.high == pytest.approx(estimate.value + half, abs=0.15 * half)


def test_intervals_of_a_ratio_hold_the_truth_19_times_in_20():
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(100):
        below = rng.uniform(1, 3, 60)
        estimate = ratio(below * 2 + rng.normal(0, 1, 60), below)
        assert estimate is not None
        hits += estimate.low <= 2 <= estimate.high
    assert hits >= 88


def test_a_ratio_is_that_of_the_sums_and_always_the_same():
    above, below = np.array([3.0, 0.0, 9.0]), np.array([1.0, 0.0, 5.0])
    estimate = ratio(above, below)
    assert estimate is not None and estimate.value == 2 and estimate == ratio(above, below)
    assert ratio(above, np.zeros(3)) is None
