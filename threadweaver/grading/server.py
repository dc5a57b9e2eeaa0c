"""The process behind a `Judge`: it forks a child for every answer, which ends when it is late.

Children start from the grader as it was built: what an answer does to it, or leaves in its caches,
no other answer sees. Messages: (number, answer) in, pickled; "number verdict" out, as text, where a
verdict is right, wrong, late or crashed.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import warnings
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

MEMORY_BYTES = 2**30  # that a grading may take beyond the memory of the server
CLOCK_PER_CPU_TIME = 10  # a grading that waits, or has to wait, gets as long by the clock
LEAST_CLOCK = 5.0  # and this many seconds at least
NICENESS = 5  # decoding goes first

Grader = Callable[..., bool]


class _Grading(NamedTuple):
    """A child and the number of its answer."""

    number: int
    pid: int


def serve(connection: Connection) -> None:
    """Grades what comes by `connection` until the other side closes it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()
    build, arguments, seconds, processes = connection.recv()
    grade = build(*arguments)
    os.nice(NICENESS)
    logging.disable()
    warnings.simplefilter("ignore")
    gc.collect()
    gc.freeze()  # pages that children do not copy
    connection.send_bytes(b"ready")
    waiting: deque[tuple[int, tuple[Any, ...]]] = deque()
    running: dict[int, _Grading] = {}  # by the descriptor of the pipe
    try:
        while os.getppid() == parent:
            ready = wait([connection, *running], timeout=1)
            if connection in ready:
                waiting.append(connection.recv())
            for pipe in running.keys() & ready:
                grading = running.pop(pipe)
                connection.send_bytes(f"{grading.number} {_verdict(pipe, grading.pid)}".encode())
            while waiting and len(running) < processes:
                number, answer = waiting.popleft()
                pipe, pid = _fork(connection, grade, answer, seconds, list(running))
                running[pipe] = _Grading(number, pid)
    except (EOFError, OSError):
        pass  # the run is over
    finally:
        for grading in running.values():
            os.kill(grading.pid, signal.SIGKILL)


def _verdict(pipe: int, pid: int) -> str:
    """What a child said before it ended, or how it ended."""
    said = os.read(pipe, 1)
    os.close(pipe)
    os.kill(pid, signal.SIGKILL)  # if it closed its pipe and goes on
    _, status = os.waitpid(pid, 0)
    if said:
        return "right" if said == b"1" else "wrong"
    signals = signal.SIGPROF, signal.SIGALRM
    return "late" if os.WIFSIGNALED(status) and os.WTERMSIG(status) in signals else "crashed"


def _fork(
    connection: Connection, grade: Grader, answer: tuple[Any, ...], seconds: float, pipes: list[int]
) -> tuple[int, int]:
    """Starts a child. Returns the pipe that its verdict comes by, and its id."""
    pipe, end = os.pipe()
    pid = os.fork()
    if pid:
        os.close(end)
        return pipe, pid
    try:
        for descriptor in (connection.fileno(), pipe, *pipes):
            os.close(descriptor)
        # Nothing handles the signals: they end even what never comes back to Python.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.setitimer(signal.ITIMER_REAL, max(LEAST_CLOCK, CLOCK_PER_CPU_TIME * seconds))
        _limit_memory()
        sys.addaudithook(_refuse)
        try:
            right = bool(grade(*answer))
        except Exception:
            right = False
        os.write(end, b"1" if right else b"0")
    finally:
        os._exit(0)


def _limit_memory() -> None:
    if sys.platform == "linux":
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        limit = pages * resource.getpagesize() + MEMORY_BYTES
        limit = limit if most == resource.RLIM_INFINITY else min(limit, most)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook: PermissionError for events that could change anything outside the process."""
    if event == "open":
        refused = arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) != 0
    else:
        refused = event.startswith(("os.", "subprocess.", "socket.", "ctypes.")) and (
            event not in ("os.listdir", "os.scandir")  # to import a module
        )
    if refused:
        raise PermissionError(f"{event} is refused to a grader")
