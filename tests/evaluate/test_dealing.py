"""Which rank decodes which problems, and how far all of them are."""

from __future__ import annotations

import random

import pytest

from tests.several_ranks import SeveralRanks
from tests.test_progress import Clock, Screen
from threadweaver.evaluate.dealing import Dealing
from threadweaver.evaluate.progress import SharedProgress
from threadweaver.shared import Messages, new_name


def dealt(patch, size: int, numbers: list[int], most: int, seed: int) -> list[list[int]]:
    """What each rank gets if ranks take more in a random order."""
    several, rng = SeveralRanks(patch, size), random.Random(seed)
    dealings = []
    for number in range(size):
        with several.rank(number):
            dealings.append(Dealing(numbers, most))
    got = [list(dealing.start) for dealing in dealings]
    busy = list(range(size))
    while busy:
        number = rng.choice(busy)
        with several.rank(number):
            taken = dealings[number].take()
        if taken is None:
            busy.remove(number)
        else:
            got[number].append(taken)
    return got


@pytest.mark.parametrize("seed", range(20))
def test_every_problem_goes_to_one_rank_and_all_begin_with_a_fair_share(monkeypatch, seed):
    rng = random.Random(seed)
    size, most = rng.randint(1, 9), rng.randint(1, 6)
    numbers = sorted(rng.sample(range(100), rng.randint(0, 40)))
    got = dealt(monkeypatch, size, numbers, most, seed)
    assert sorted(n for own in got for n in own) == numbers
    fair = -(-len(numbers) // size)
    for rank, own in enumerate(got):
        start = min(most, fair)
        assert own[:start] == numbers[rank : start * size : size]


def test_a_rank_that_is_early_takes_all_that_is_left(monkeypatch):
    several = SeveralRanks(monkeypatch, 3)
    with several.rank(2):
        early = Dealing(range(10), 2)
        assert early.start == [2, 5] and early.take_up_to(9) == [6, 7, 8, 9]
    with several.rank(0):
        late = Dealing(range(10), 2)
        assert late.start == [0, 3] and late.take() is None


def test_in_one_process_all_problems_are_there_at_the_start():
    dealing = Dealing(range(7), 7)
    assert dealing.start == list(range(7)) and dealing.take() is None


def test_messages_reach_the_first_rank_once_in_order(monkeypatch):
    several = SeveralRanks(monkeypatch, 2)
    with several.rank(0):
        here = Messages(new_name("a"))
        assert here.receive() == []
    with several.rank(1):
        there = Messages(new_name("a"))
        for text in ("one", "zwei ü"):
            there.send(text)
    with several.rank(0):
        assert here.receive() == ["one", "zwei ü"] and here.receive() == []


class Decoded:
    decoded_tokens = 0


def test_progress_is_that_of_all_ranks(monkeypatch):
    clock, several, screen = Clock(), SeveralRanks(monkeypatch, 2), Screen()
    monkeypatch.setattr("threadweaver.progress.monotonic", clock)
    monkeypatch.setattr("threadweaver.evaluate.progress.perf_counter", clock)
    engines = Decoded(), Decoded()
    with several.rank(1):
        other = SharedProgress(Screen().console, "decoding", 6, engines[1])
        other.__enter__()
    with several.rank(0):
        first = SharedProgress(screen.console, "decoding", 6, engines[0])
        first.__enter__()
    for step in range(1, 4):
        clock.move(2)
        engines[0].decoded_tokens, engines[1].decoded_tokens = 10 * step, 30 * step
        with several.rank(1):
            other.decoded(step)
        with several.rank(0):
            first.decoded(min(step, 2))
    with several.rank(1):
        other.graded(3)
    with several.rank(0):
        first.graded(2)
        assert screen.lines == ["decoding: 5/6 responses, 20 tokens/s, 1 s left"]
        first.decoded(3)
        first.graded(3)
        first.__exit__()
    assert screen.lines[1:] == ["decoding: 6/6 responses, 20 tokens/s, 6 graded, in 6 s"]
    assert (first.seconds, other.seconds) == (6, 6)
