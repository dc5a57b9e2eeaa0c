"""What is shown of work while it goes on: lines by a clock that tests move, bars on a terminal."""

from __future__ import annotations

import io
import sys
import threading
from types import SimpleNamespace

import pytest
from rich.console import Console

from threadweaver import progress
from threadweaver.progress import Progress, ResponsesProgress, Status, print_line

ERASED = "\x1b[2K"


class Clock:
    """Stands still unless it is moved."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def move(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "monotonic", clock)
    return clock


class Screen:
    """A console, and what went to it."""

    def __init__(self, terminal: bool = False, width: int = 100):
        self.file = io.StringIO()
        self.console = Console(file=self.file, force_terminal=terminal, width=width, _environ={})

    @property
    def text(self) -> str:
        return self.file.getvalue()

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()


# Without a terminal.


def test_work_that_is_over_soon_prints_nothing(clock):
    screen = Screen()
    with Progress(screen.console, "counting", 4, "sheep") as work:
        for _ in work.track(range(4)):
            clock.move(1.2)
    assert screen.text == ""


def test_longer_work_prints_a_line_every_few_seconds_and_one_at_its_end(clock):
    screen = Screen()
    with Progress(screen.console, "counting", 2000, "sheep") as work:
        for done in range(1, 2001):
            clock.move(1 / 128)
            work.update(done)
    assert screen.lines == [
        "counting: 640/2,000 sheep, 11 s left",
        "counting: 1,280/2,000 sheep, 6 s left",
        "counting: 1,920/2,000 sheep, 1 s left",
        "counting: 2,000/2,000 sheep, in 16 s",
    ]


def test_work_of_unknown_length_has_a_count_and_no_time_left(clock):
    screen = Screen()
    with Progress(screen.console, "reading", None, "rows") as work:
        for _ in work.track(range(3)):
            clock.move(2)
    assert screen.lines == ["reading: 3 rows", "reading: 3 rows, in 6 s"]


def test_nothing_done_yet_means_no_time_left(clock):
    screen = Screen()
    with Progress(screen.console, "decoding", 3, "responses") as work:
        clock.move(5)
        work.update(0, "7 tokens/s")
    assert screen.lines[0] == "decoding: 0/3 responses, 7 tokens/s"


def test_work_that_fails_has_no_last_line(clock):
    screen = Screen()
    with pytest.raises(KeyboardInterrupt), Progress(screen.console, "w", 3, "steps") as work:
        clock.move(9)
        work.update(1)
        raise KeyboardInterrupt
    assert screen.lines == ["w: 1/3 steps, 18 s left"]


def test_a_line_is_not_folded_and_brackets_are_no_markup(clock):
    screen, path = Screen(width=40), "/data/[red]" + "x" * 60
    with Progress(screen.console, f"reading {path}", None, "rows") as work:
        clock.move(5)
        work.update(1)
    assert screen.lines[0] == f"reading {path}: 1 rows"


def test_responses_have_a_rate_of_tokens_since_they_began_and_are_then_graded(clock):
    screen, engine = Screen(), SimpleNamespace(decoded_tokens=999)
    with ResponsesProgress(screen.console, "evaluating", 4, engine) as work:  # pyright: ignore[reportArgumentType]
        for done in range(5):
            work.decoded(done)
            engine.decoded_tokens += 5000
            clock.move(2)
        clock.move(40)
        for count in range(1, 5):
            work.graded(count)
    assert screen.lines == [
        "evaluating: 3/4 responses, 2,500 tokens/s, 2 s left",
        "evaluating: 4/4 responses, 2,500 tokens/s, 1 graded",
        "evaluating: 4/4 responses, 2,500 tokens/s, 4 graded, in 50 s",
    ]


# On a terminal.


def test_a_terminal_gets_a_bar_that_goes_when_the_work_is_over(clock):
    screen = Screen(terminal=True)
    before = threading.active_count()
    with Progress(screen.console, "counting", 3, "sheep") as work:
        assert "counting" in screen.text and "0/3" in screen.text and "sheep" in screen.text
        work.update(1, "a note")
        assert "1/3" not in screen.text  # a frame has its time
        clock.move(0.1)
        work.update(2, "a note")
        assert "2/3" in screen.text and "a note" in screen.text
        assert threading.active_count() == before
        clock.move(60)
        work.update(3)
    assert "counting: " not in screen.text
    assert screen.text.endswith(ERASED)


def test_a_part_of_other_work_has_a_bar_below_once_it_has_lasted(clock):
    screen = Screen(terminal=True)
    with Progress(screen.console, "outer", 2, "steps"):
        for seconds in (0.4, 0.6):
            with Progress(screen.console, "inner", 5, "pieces") as part:
                clock.move(seconds)
                part.update(3)
                assert ("inner" in screen.text) == (seconds > 0.5)
        after = len(screen.text)
        screen.console.print("between")
        assert "outer" in screen.text[after:] and "inner" not in screen.text[after:]
    assert not progress._displays


def test_a_dumb_terminal_gets_lines(clock):
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, _environ={"TERM": "dumb"})
    with Progress(console, "counting", 3, "sheep") as work:
        clock.move(5)
        work.update(1)
    assert file.getvalue().startswith("counting: 1/3 sheep")


# Status.


def test_a_status_is_a_line_every_few_seconds_over_all_stretches_of_work(clock):
    screen = Screen()
    status = Status(screen.console)
    for stretch in range(4):
        with status:
            for what in ("preparing", "timing"):
                status.show(f"case {stretch}: {what}")
                clock.move(1.5)
    assert screen.lines == ["case 2: preparing"]


def test_what_takes_longer_than_a_line_can_wait_is_named_before_it(clock):
    screen = Screen()
    with Status(screen.console) as status:
        status.show("timing fast", 0.1)
        status.show("timing slow", 4.9)
        assert screen.text == ""
        status.show("timing slow", 60)
        assert screen.lines == ["timing slow"]


def test_a_status_on_a_terminal_shows_at_once_what_may_take_long_and_goes(clock):
    screen = Screen(terminal=True)
    status = Status(screen.console)
    for case in "ab":
        with status:
            status.show(f"preparing {case}")
            assert f"preparing {case}" in screen.text
            status.show(f"timing {case}, round 1/50", 1e-4)
            assert f"timing {case}, round 1" not in screen.text
            status.show(f"timing {case}, round 2/50", 3.0)
            assert f"timing {case}, round 2" in screen.text
        assert screen.text.endswith(ERASED)


def test_what_is_timed_keeps_its_own_stdout(clock):
    screen, streams = Screen(terminal=True), (sys.stdout, sys.stderr)
    with Status(screen.console) as status:
        status.show("timing")
        assert (sys.stdout, sys.stderr) == streams


def test_a_line_of_text_that_others_wrote_gives_a_terminal_no_command():
    file = io.StringIO()
    print_line(Console(file=file, force_terminal=True), "left out: \x1b[2J\x07\x7f\x9b1mok")
    assert file.getvalue() == "left out: ␛[2J␇␡\ufffd1mok\n"
