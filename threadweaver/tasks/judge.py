"""Grading of untrusted answers, in a process of its own that may be killed.

A grader works on what a model wrote: it may never end, take all memory or, where a scorer hands the
answer to `eval`, run any code. None of this may affect the training run.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)

MEMORY_BYTES = 2 * 2**30  # that grading may take beyond the memory of the process at its start


class _Worker(NamedTuple):
    process: BaseProcess
    connection: Connection


class Judge:
    """Calls a grader in another process, within limits of time and memory.

    The process is started at the first call, and again after an answer that ended it. It can
    neither write files nor start processes nor open connections: a guard against answers that
    happen to be code, not against an attacker. Thread-safe; calls run one at a time.

    Args:
        build: called with `arguments` in that process when it starts; returns the grader. A
            function of a module, so that it can be pickled; that module should import little.
        seconds: wall-clock limit of one grading.

    Attributes:
        ungraded: gradings so far that did not end, and count as wrong.
    """

    def __init__(
        self, build: Callable[..., Callable[..., bool]], *arguments: Any, seconds: float = 5.0
    ):
        self.ungraded = 0
        self._target = (build, arguments, seconds)
        self._seconds = seconds
        self._worker: _Worker | None = None
        self._turn = threading.Lock()

    def __call__(self, *answer: Any, source: str) -> bool:
        """The grader's verdict on `answer`; False if it raises an exception.

        Also False, and counted and logged with `source`, if it does not end within the limit or
        takes its process down. Raises RuntimeError if the grader cannot be built.
        """
        with self._turn:
            if self._worker is None or not self._worker.process.is_alive():
                self._worker = self._start()
            connection = self._worker.connection
            try:
                connection.send(answer)
                if connection.poll(self._seconds):
                    return connection.recv_bytes() == b"right"
                failure = f"did not end within {self._seconds:g} s"
            except (EOFError, OSError):
                failure = "crashed"
            self._worker.process.kill()
            self._worker = None
            self.ungraded += 1
        logger.warning("%s: grading an answer %s; it counts as wrong", source, failure)
        return False

    def _start(self) -> _Worker:
        # Spawned: neither threads nor CUDA survive a fork.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, *self._target), daemon=True)
        process.start()
        theirs.close()
        try:
            ours.recv_bytes()
        except EOFError:
            raise RuntimeError("the grader did not start; its process says why on stderr") from None
        return _Worker(process, ours)


def _serve(
    connection: Connection,
    build: Callable[..., Callable[..., bool]],
    arguments: tuple[Any, ...],
    seconds: float,
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run to handle
    grade = build(*arguments)
    logging.disable()
    warnings.simplefilter("ignore")
    _limit_memory()
    sys.addaudithook(_refuse)
    connection.send_bytes(b"ready")
    while True:
        try:
            answer = connection.recv()
        except EOFError:
            return
        # A grading without end also ends if the run has died and cannot kill it.
        signal.setitimer(signal.ITIMER_REAL, 2 * seconds)
        try:
            right = bool(grade(*answer))
        except Exception:
            right = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        # Bytes: nothing that an answer made is unpickled on the other side.
        connection.send_bytes(b"right" if right else b"wrong")


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
