"""One input through its command in this process, and whether the command ended as it must:

- refused: exit code 2, one line on stderr that names what was wrong, and nothing begun;
- accepted: exit code 0, no word of an error, and the effect that is documented;
- stopped, of an input that asks for endless work: by Ctrl-C, in one line, with its exit code.
"""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from threadweaver.command import MOST_CHARACTERS

MOST_SECONDS = 180  # by the clock, on a machine that may be busy
SECONDS_TO_STOP = 2  # of computing, after which an input that asks for endless work is interrupted

# Command -> the module with its main(arguments) -> exit code.
MODULES = {
    "train": "threadweaver.train.__main__",
    "generate": "threadweaver.generate.__main__",
    "eval": "threadweaver.evaluate.__main__",
    "tasks": "threadweaver.tasks.__main__",
    "annotate": "threadweaver.annotate.__main__",
    "add_tags": "threadweaver.add_tags",
    "bench": "bench.__main__",
}


@dataclass
class Input:
    """A command line and what must come of it.

    Attributes:
        kind: of what was damaged, and how.
        command: a key of MODULES.
        must: what must happen; None: either.
        names: of these the line of a refusal must hold one, in any case of its letters.
        endless: whether, accepted, it may ask for more work than a test can wait for.
        effect: of what was accepted: what is not as documented, or None.
        unbegun: what must not be there after a refusal.
        exit_codes: further ones of a command that did its work.
        writes: a file that it may leave in the current folder.
    """

    kind: str
    command: str
    arguments: list[str]
    must: Literal["refuse", "accept"] | None = None
    names: tuple[str, ...] = ()
    endless: bool = False
    effect: Callable[[Outcome], str | None] = lambda outcome: None
    unbegun: Path | None = None
    exit_codes: tuple[int, ...] = ()
    writes: str = ""


@dataclass
class Outcome:
    """How a command ended. `code` is that of the exit, or the traceback of an exception."""

    code: int | str
    stdout: str
    stderr: str
    seconds: float


class TooLong(BaseException):
    """Not to be caught by what runs."""


def run(given: Input, folder: Path) -> Outcome:
    """Runs the command in an empty folder, within MOST_SECONDS."""
    main = importlib.import_module(MODULES[given.command]).main
    folder.mkdir(parents=True)
    code: int | str
    with _output(folder.parent) as read, _restored(folder), _time_limit(given.endless):
        start = time.perf_counter()
        try:
            code = main(list(given.arguments))
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        except TooLong:
            code = f"took more than {MOST_SECONDS} s\n{traceback.format_exc(limit=-4)}"
        except BaseException:
            code = traceback.format_exc()
        seconds = time.perf_counter() - start
    return Outcome(code, *read(), seconds)


def fault(given: Input, outcome: Outcome, folder: Path) -> str | None:
    """What is wrong with how the command ended; None if nothing is."""
    code, err = outcome.code, outcome.stderr
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    if isinstance(code, str):
        return f"an exception: {code}"
    for text in (err, outcome.stdout):
        if "Traceback" in text:
            return f"a traceback in its output: {text[-MOST_CHARACTERS:]}"
    if leftover := sorted({p.name for p in folder.iterdir()} - {given.writes}):
        return f"left in the current folder: {leftover}"
    if code == 2:
        if len(err.splitlines()) != 1 or not errors:
            return "not one line on stderr"
        if len(err) > MOST_CHARACTERS + 100 or len(err) < 20:
            return f"a line of {len(err)} characters"
        if given.must == "accept":
            return "refused, though it is good"
        if given.names and not any(name.lower() in err.lower() for name in given.names):
            return f"the line names none of {given.names}"
        # That nothing is right is known at the end.
        if given.unbegun and given.unbegun.exists() and "kept none" not in err:
            return f"refused, and yet there is {given.unbegun}"
        return None
    if code == 0 or code in given.exit_codes:
        if errors:
            return "an error, and exit code 0"
        if given.must == "refuse":
            return "accepted, though it is bad"
        try:
            return given.effect(outcome)
        except Exception as error:
            return f"accepted without its effect: {type(error).__name__}: {error}"
    if len(errors) != 1:
        return f"exit code {code} with {len(errors)} lines of errors"
    if code == 128 + signal.SIGINT and given.endless:
        return None
    if code == 1 and "not finite" in errors[0] and given.must is None:
        return None  # documented
    return f"exit code {code}"


def ending(outcome: Outcome) -> str:
    """In a word."""
    return {0: "accepted", 2: "refused", 130: "stopped"}.get(outcome.code, "other")  # pyright: ignore[reportCallIssue, reportArgumentType] (of a str: other)


@contextmanager
def _output(folder: Path) -> Iterator[Callable[[], tuple[str, str]]]:
    """All that this process and its children write meanwhile, the descriptors' included."""
    with (
        tempfile.TemporaryFile(dir=folder) as out,
        tempfile.TemporaryFile(dir=folder) as err,
    ):

        def read() -> tuple[str, str]:
            return texts[0], texts[1]

        texts: list[str] = []
        sys.stdout.flush()
        sys.stderr.flush()
        before = sys.stdout, sys.stderr
        descriptors = os.dup(1), os.dup(2)
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.stdout, sys.stderr = (
            os.fdopen(os.dup(n), "w", encoding="utf-8", errors="backslashreplace") for n in (1, 2)
        )
        try:
            yield read
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.close()
            sys.stdout, sys.stderr = before
            for number, descriptor in enumerate(descriptors, start=1):
                os.dup2(descriptor, number)
                os.close(descriptor)
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode("utf-8", errors="replace"))


@contextmanager
def _restored(folder: Path) -> Iterator[None]:
    """The current folder is an empty one; settings of PyTorch are as before at the end."""
    before, threads = Path.cwd(), torch.get_num_threads()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)


@contextmanager
def _time_limit(endless: bool) -> Iterator[None]:
    """Ctrl-C by computing time, the end by the clock: a wait for ever computes nothing."""

    def end(*_: object) -> None:
        raise TooLong

    def interrupt(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM, signal.SIGPROF)
    handlers = {number: signal.getsignal(number) for number in numbers}
    signal.signal(signal.SIGALRM, end)
    signal.signal(signal.SIGPROF, interrupt)
    signal.setitimer(signal.ITIMER_REAL, MOST_SECONDS)
    signal.setitimer(signal.ITIMER_PROF, SECONDS_TO_STOP if endless else 0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def remove(folder: Path) -> None:
    """Also what may not be read."""
    for path in folder.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)
