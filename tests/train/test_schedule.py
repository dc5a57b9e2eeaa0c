import math

import pytest

from threadweaver.train.schedule import constant_rate, cosine_rate


def test_the_rate_climbs_evenly_then_falls_along_a_cosine():
    rates = [cosine_rate(step, 100, 2.0, 0.05) for step in range(100)]
    assert rates[:6] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0, 2.0])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[5 + 57] == pytest.approx(2 * 0.5 * (1 + math.cos(0.6 * math.pi)))
    assert 0 < rates[-1] < 2e-3


@pytest.mark.parametrize("warmup", [0.0, 1.0])
def test_no_warmup_starts_at_the_peak_and_all_warmup_ends_there(warmup):
    rates = [cosine_rate(step, 10, 1.0, warmup) for step in range(10)]
    assert (rates[-1] if warmup else rates[0]) == 1.0


def test_every_step_of_the_shortest_run_moves_the_weights():
    assert cosine_rate(0, 1, 1.0, 0.05) == 1.0


def test_the_rate_climbs_evenly_then_stays():
    rates = [constant_rate(step, 100, 2.0, 0.05) for step in range(100)]
    assert rates[:6] == [cosine_rate(step, 100, 2.0, 0.05) for step in range(6)]
    assert set(rates[4:]) == {2.0}
    assert constant_rate(0, 10, 2.0, 0.0) == 2.0
