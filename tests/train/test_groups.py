"""Which groups are sampled for a batch, and which of them it consists of."""

from __future__ import annotations

from random import Random

import pytest

from threadweaver.train.groups import Group, batch_of, sample_groups


def groups_of(signals: list[bool]) -> list[Group]:
    return [Group([], [], [0.5, -0.5] if signal else [0.0, 0.0]) for signal in signals]


def sampled(signals: list[bool], size: int, limit: int) -> tuple[list[Group], list[int]]:
    """What is sampled if the groups of the problems, in order, have these signals; and the number
    of each request."""
    rest, asked = groups_of(signals), []

    def sample(count: int) -> list[Group]:
        asked.append(count)
        taken = rest[:count]
        assert len(taken) == count
        del rest[:count]
        return taken

    return sample_groups(sample, size, limit), asked


def test_without_refill_a_batch_is_one_request_and_all_of_it():
    groups, asked = sampled([False, True, False, False], 4, 1)
    assert asked == [4] and batch_of(groups, 4) == groups


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_refill_ends_with_a_full_batch_or_at_the_limit(seed, share):
    random = Random(seed)
    size, limit = random.randint(1, 40), random.randint(1, 4)
    groups, asked = sampled([random.random() < share for _ in range(200)], size, limit)
    with_signal = [group for group in groups if group.has_signal]
    assert sum(asked) == len(groups) <= limit * size and max(asked) <= size
    assert len(with_signal) >= size or len(groups) == limit * size
    # It stopped as soon as it could.
    before = groups[: len(groups) - asked[-1]]
    assert sum(group.has_signal for group in before) < size
    batch = batch_of(groups, size)
    assert len(batch) == size
    assert [group for group in batch if group.has_signal] == with_signal[:size]
    positions = [groups.index(group) for group in batch]
    assert positions == sorted(positions)


def test_refill_asks_for_what_is_missing_at_the_share_seen_so_far():
    signals = [i % 4 == 0 for i in range(24)]
    _, asked = sampled(signals, 8, 3)
    assert asked == [8, 8, 8]  # 6 missing at a share of 1/4 would be 24
    _, asked = sampled([True] * 7 + [False] + [True] * 8, 8, 3)
    assert asked == [8, 2]  # 1 missing at a share of 7/8
