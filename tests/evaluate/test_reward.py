import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from threadweaver.evaluate.reward import RewardConfig, reward
from threadweaver.trajectory import Codec, PathLengths, path_lengths

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "golden.json").read_text())
# As in tests/trajectory/test_golden_trajectories.py.
CODEC = Codec.from_vocab(
    {**GOLDEN["tags"], "\n": 60, **{str(n): 49 + n for n in range(1, 10)}}, eos_id=120
)

lengths = st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)).map(
    lambda pair: PathLengths(max(pair), min(pair), 1, 2.0)
)
amounts = st.floats(0, 10)
configs = st.builds(
    RewardConfig, st.sampled_from(["clipped", "latency", "none"]), amounts, amounts, amounts
)


def of_length(total: int, longest: int) -> PathLengths:
    return PathLengths(total, longest, 1, 2.0)


@pytest.mark.parametrize(
    ("longest", "expected"), [(100, 1.0), (90, 1.05), (80, 1.1), (40, 1.1), (0, 1.1)]
)
def test_a_right_answer_earns_half_its_acceleration_up_to_a_fifth(longest, expected):
    earned = reward(True, of_length(100, longest), RewardConfig(), "")
    assert earned.total == pytest.approx(expected)
    assert (earned.correct, earned.speed) == (1.0, pytest.approx(expected - 1))


@pytest.mark.parametrize("case", GOLDEN["stats"], ids=range(len(GOLDEN["stats"])))
def test_rewards_of_golden_trajectories(case):
    lengths = path_lengths(case["ids"], CODEC)
    expected = 1 + 0.5 * min(case["acceleration"], 0.2)
    assert reward(1, lengths, RewardConfig(), "").total == pytest.approx(expected, abs=1e-12)
    assert reward(0, lengths, RewardConfig(), "").total == 0


@given(lengths=lengths, config=configs)
def test_a_wrong_answer_earns_nothing_for_speed(lengths, config):
    earned = reward(False, lengths, config, "")
    assert (earned.correct, earned.speed, earned.total) == (0, 0, 0)


@given(lengths=lengths, config=configs)
def test_a_right_answer_earns_at_least_half_more_than_a_wrong_one(lengths, config):
    earned = reward(True, lengths, config, "")
    assert earned.total >= 0.5
    assert earned.total == earned.correct + earned.speed
    low, high = {
        "clipped": (0, config.rho * config.clip),
        "latency": (-0.5, 0),
        "none": (0, 0),
    }[config.accel]
    assert low <= earned.speed <= high


@given(total=st.integers(1, 10**6), paths=st.tuples(*[st.integers(0, 10**6)] * 2), config=configs)
def test_a_longer_path_never_earns_more(total, paths, config):
    shorter, longer = sorted(min(path, total) for path in paths)
    assert (
        reward(True, of_length(total, longer), config, "").total
        <= reward(True, of_length(total, shorter), config, "").total
    )


def test_latency_costs_by_the_token_up_to_a_half():
    config = RewardConfig(accel="latency", latency_cost=1e-3)
    totals = [reward(1, of_length(10**4, n), config, "").total for n in (0, 100, 500, 501, 10**4)]
    assert totals == pytest.approx([1, 0.9, 0.5, 0.5, 0.5])


def test_an_empty_response_has_no_acceleration():
    assert reward(1, of_length(0, 0), RewardConfig(), "").total == 1


@pytest.mark.parametrize("correct", [math.nan, math.inf, -1, 2, 0.5])
def test_a_correctness_that_is_none_is_refused_by_problem(correct):
    with pytest.raises(ValueError, match=rf"^rows\.jsonl:3: the correctness .* is {correct};"):
        reward(correct, of_length(10, 5), RewardConfig(), "rows.jsonl:3")


@pytest.mark.parametrize("name", ["rho", "clip", "latency_cost"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_a_setting_out_of_range_is_named(name, value):
    with pytest.raises(ValueError, match=f"^{name} is {value}"):
        RewardConfig(**{name: value})
