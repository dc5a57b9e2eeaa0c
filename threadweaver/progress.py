"""Progress of work: a bar on a terminal, elsewhere a line every few seconds.

    with Progress(console, "evaluating", len(problems), "problems") as progress:
        for problem in progress.track(problems):
            ...

Work that is over sooner prints no line. No thread runs beside the work: everything is shown by the
calls that report progress, so that nothing disturbs what is computed or timed in between.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from time import monotonic
from typing import Protocol, Self, TypeVar

from rich import progress as rich_progress
from rich.console import Console
from rich.live import Live
from rich.text import Text

from threadweaver.output import visible

LINE_SECONDS = 5.0
FRAME_SECONDS = 0.1
# A bar for a part of other work appears later: those of quick parts would only flicker.
PART_SECONDS = 0.5

T = TypeVar("T")

# A console has one live display; a part of other work adds its bar to it.
_displays: dict[Console, rich_progress.Progress] = {}


class Pace:
    """A timer: due so many seconds after the last time that it was due, or after the start."""

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._next = monotonic() + seconds

    def due(self, wanted: bool = False, coming: float = 0.0) -> bool:
        """Whether it is due or `wanted`; if so, the time starts again.

        Args:
            coming: seconds until the next call.
        """
        now = monotonic()
        if now + coming < self._next and not wanted:
            return False
        self._next = now + self._seconds
        return True


def has_no_reader(console: Console) -> bool:
    """Whether the console writes to an `Output`, a pipe that nobody reads any more."""
    return getattr(console.file, "is_broken_pipe", False)


def print_line(console: Console, text: str) -> None:
    """Prints a line without wrapping or markup, since paths may be long or hold brackets."""
    console.print(visible(text), markup=False, highlight=False, soft_wrap=True)


class Bar:
    """A bar with a count and the time left, on a terminal; elsewhere nothing.

    Args:
        total: None if it is not known.
        unit: what is counted, in the plural.
        done: how much of it was done before.
        stays: whether the bar stays when the work is over.
    """

    def __init__(
        self,
        console: Console,
        title: str,
        total: int | None,
        unit: str,
        *,
        done: int = 0,
        stays: bool = False,
    ):
        self._console = console
        self._title, self._total, self._unit = title, total, unit
        self._done, self._note = done, ""
        self._stays = stays
        self._display: rich_progress.Progress | None = None
        self._task: rich_progress.TaskID | None = None

    def __enter__(self) -> Self:
        if not self._console.is_interactive:
            return self
        self._display = _displays.get(self._console)
        self._is_part = self._display is not None
        self._frames = Pace(PART_SECONDS if self._is_part else FRAME_SECONDS)
        if self._display is None:
            self._display = _displays[self._console] = _display(self._console, self._stays)
            self._display.start()
            self._draw(self._display)
        return self

    def __exit__(self, *exc) -> None:
        if self._display is None:
            return
        if not self._is_part:
            del _displays[self._console]
            self._draw(self._display)
            self._display.stop()
        elif self._task is not None:
            self._display.remove_task(self._task)
            self._display.refresh()

    def update(self, done: int, note: str = "") -> None:
        self._done, self._note = done, note
        if self._display is not None and self._frames.due():
            self._draw(self._display)

    def _draw(self, display: rich_progress.Progress) -> None:
        if self._task is None:
            # What was done before counts for the bar and not for the speed.
            self._task = display.add_task(
                self._title,
                total=self._total,
                completed=self._done,
                unit=self._unit,
                note=self._note,
            )
        else:
            display.update(self._task, completed=self._done, note=self._note, refresh=True)


def _display(console: Console, stays: bool) -> rich_progress.Progress:
    # What the work prints to the terminal goes above the bars.
    redirect = sys.stdout.isatty() and sys.stderr.isatty()
    return rich_progress.Progress(
        rich_progress.TextColumn("{task.description}", markup=False),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TextColumn("{task.fields[unit]}", markup=False),
        rich_progress.TextColumn("{task.fields[note]}", markup=False),
        rich_progress.TimeRemainingColumn(),
        console=console,
        auto_refresh=False,
        transient=not stays,
        redirect_stdout=redirect,
        redirect_stderr=redirect,
    )


class Progress(Bar):
    """Work that is counted: a bar while it lasts, or lines, the last of them when it is done."""

    def __enter__(self) -> Self:
        self._start = monotonic()
        self._lines = Pace(LINE_SECONDS)
        self._printed = False
        return super().__enter__()

    def __exit__(self, kind: type[BaseException] | None = None, *exc) -> None:
        super().__exit__()
        if self._printed and kind is None:
            self._print(f"in {self._seconds:,.0f} s")

    def update(self, done: int, note: str = "") -> None:
        """Reports how much is done by now, with a note to show beside it."""
        super().update(done, note)
        if not self._console.is_interactive and self._lines.due():
            self._printed = True
            self._print(self._left())

    def advance(self) -> None:
        """One more is done."""
        self.update(self._done + 1)

    def track(self, items: Iterable[T]) -> Iterator[T]:
        """Yields the items; each counts as done when the next is asked for."""
        for item in items:
            yield item
            self.advance()

    @property
    def _seconds(self) -> float:
        return monotonic() - self._start

    def _left(self) -> str:
        if self._total is None or not 0 < self._done < self._total:
            return ""
        return f"{self._seconds * (self._total - self._done) / self._done:,.0f} s left"

    def _print(self, time: str) -> None:
        total = "" if self._total is None else f"/{self._total:,}"
        parts = (f"{self._done:,}{total} {self._unit}", self._note, time)
        print_line(self._console, f"{self._title}: {', '.join(filter(None, parts))}")


class DecodesTokens(Protocol):
    """An engine, as far as a progress line is concerned."""

    decoded_tokens: int


class ResponsesProgress(Progress):
    """Responses that are decoded, with tokens per second, and then graded."""

    def __init__(self, console: Console, title: str, total: int, engine: DecodesTokens):
        super().__init__(console, title, total, "responses")
        self._all, self._engine, self._tokens_before = total, engine, engine.decoded_tokens
        self._rate = ""

    def decoded(self, count: int) -> None:
        """Reports how many have been decoded by now."""
        if seconds := self._seconds:
            tokens = self._engine.decoded_tokens - self._tokens_before
            self._rate = f"{tokens / seconds:,.0f} tokens/s"
        self.update(count, self._rate)

    def graded(self, count: int) -> None:
        """Reports how many have been graded by now; all have been decoded."""
        self.update(self._all, ", ".join(filter(None, (self._rate, f"{count:,} graded"))))


class Status:
    """What is being done now: on a terminal a line that is removed at the end, elsewhere a line
    every few seconds. May be entered again for the next stretch of work."""

    def __init__(self, console: Console):
        self._console = console
        self._lines, self._frames = Pace(LINE_SECONDS), Pace(FRAME_SECONDS)
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._console.is_interactive:
            # Output is not redirected: the work may be timed.
            self._live = Live(
                console=self._console,
                auto_refresh=False,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()
        return self

    def __exit__(self, *exc) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def show(self, text: str, seconds: float | None = None) -> None:
        """Shows what comes next.

        Args:
            seconds: how long it will take, if known. Nothing can be shown in this time, so a line
                that would be due in it is shown before.
        """
        if self._live is None:
            if self._lines.due(coming=seconds or 0.0):
                print_line(self._console, text)
        elif self._frames.due(wanted=seconds is None, coming=seconds or 0.0):
            self._live.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)
