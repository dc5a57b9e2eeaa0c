import math
from statistics import fmean, pstdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from threadweaver.train.advantages import group_advantages

REWARDS = st.lists(st.sampled_from([0.0, 1.0, 1.037, 1.1]), min_size=2, max_size=16)


def test_the_worked_example():
    assert group_advantages([1.1, 0.9, 1.0, 1.0]) == pytest.approx([0.1, -0.1, 0, 0], abs=1e-15)


def test_the_ablation_blows_small_differences_up_to_unit_scale():
    advantages = group_advantages([1.1, 0.9, 1.0, 1.0], "std")
    assert advantages == pytest.approx([1.5**0.5, -(1.5**0.5), 0, 0], rel=1e-4, abs=1e-15)


@given(REWARDS)
def test_advantages_are_rewards_less_their_mean(rewards):
    mean = sum(rewards) / len(rewards)
    got = group_advantages(rewards)
    assert got == pytest.approx([reward - mean for reward in rewards], abs=1e-12)
    assert math.fsum(got) == pytest.approx(0, abs=1e-12)


@given(REWARDS.filter(lambda rewards: len(set(rewards)) > 1))
def test_std_advantages_have_unit_sample_variance(rewards):
    got = group_advantages(rewards, "std")
    assert fmean(got) == pytest.approx(0, abs=1e-9)
    bessel = len(rewards) / (len(rewards) - 1)
    assert bessel * pstdev(got) ** 2 == pytest.approx(1, rel=1e-3)


@given(st.floats(0, 2), st.integers(1, 16), st.sampled_from(["mean", "std"]))
def test_a_group_without_signal_has_no_advantage_that_is_not_zero(reward, size, advantage):
    # The mean of equal floats is not always one of them.
    assert group_advantages([reward] * size, advantage) == [0.0] * size


@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_refused_by_the_number_of_its_rollout(reward):
    with pytest.raises(ValueError, match=f"^rollout 2 of 4: its reward is {reward}$"):
        group_advantages([1.0, 0.0, reward, 1.0])
