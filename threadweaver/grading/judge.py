"""Grading of untrusted answers, in processes that may be killed.

A grader works on what a model wrote: it may never end, take all memory or, where a scorer hands the
answer to `eval`, run any code. None of this may affect the training run, or another answer.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)

MOST_CHARACTERS = 10_000  # of an answer: a parser may need the square of it
MOST_PROCESSES = 32  # by default
# Run by a bare interpreter, so that no script is imported a second time, guarded or not.
_START = """
import sys
from multiprocessing.connection import Connection
connection = Connection(int(sys.argv[1]))
sys.path[:] = connection.recv()
from threadweaver.grading.server import serve
serve(connection)
"""


class _Server(NamedTuple):
    process: subprocess.Popen
    connection: Connection

    def end(self) -> None:
        """Ends the process, which ends its children first."""
        self.connection.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Judge:
    """Calls a grader in other processes, within limits of time and memory.

    A server process builds the grader once, at the first call, and grades every answer in a child
    of its own (threadweaver.grading.server): verdicts depend neither on the number of processes
    nor on what was graded before. The processes end with the judge or its process, however that
    ends. Thread-safe.

    Args:
        build: called with `arguments` in the server; returns the grader. A function of a module, so
            that it can be pickled; that module should import little.
        seconds: CPU time of one grading. Ten times as long by the clock, at least 5 s, ends one
            that sleeps.
        processes: answers that are graded at the same time; default: one a CPU, which ranks on the
            same machine share out.

    Attributes:
        ungraded: gradings so far that did not end, and count as wrong.
    """

    def __init__(
        self,
        build: Callable[..., Callable[..., bool]],
        *arguments: Any,
        seconds: float = 5.0,
        processes: int | None = None,
    ):
        self.ungraded = 0
        self._seconds = seconds
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self._processes = processes or max(1, min(_num_cpus() // ranks, MOST_PROCESSES))
        self._target = (build, arguments, seconds, self._processes)
        self._server: _Server | None = None
        self._lock = threading.Lock()
        self._count = 0
        self._sources: dict[int, str] = {}  # of answers that are being graded, by number
        self._verdicts: dict[int, bool] = {}  # that nobody has asked for

    def __call__(self, *answer: Any, source: str) -> bool:
        """The grader's verdict on `answer`; False if it raises an exception.

        Also False, and counted and logged with `source`, if it does not end within the limit, takes
        its process down, or has a text of more than MOST_CHARACTERS for its first part. Raises
        RuntimeError if the grader cannot be built.
        """
        return self.submit(*answer, source=source)()

    def submit(self, *answer: Any, source: str) -> Callable[[], bool]:
        """Starts to grade; what it returns waits for the verdict, and is to be called once."""
        with self._lock:
            number = self._count
            self._count += 1
            if isinstance(answer[0], str) and len(answer[0]) > MOST_CHARACTERS:
                self._give_up(source, f"of {len(answer[0]):,} characters takes too long")
                return lambda: False
            message = pickle.dumps((number, answer))
            server = self._running()
            self._sources[number] = source
            try:
                # Read before writing: a server that cannot write its verdicts would not read.
                while server.connection.poll():
                    self._receive(server)
                server.connection.send_bytes(message)
            except (EOFError, OSError):
                self._lose(server)
        return lambda: self._wait(number)

    def _wait(self, number: int) -> bool:
        with self._lock:
            while number not in self._verdicts:
                assert self._server is not None
                try:
                    self._receive(self._server)
                except (EOFError, OSError):
                    self._lose(self._server)
            return self._verdicts.pop(number)

    def _receive(self, server: _Server) -> None:
        """Takes the next verdict. It is text: nothing that an answer made is unpickled here."""
        number, verdict = server.connection.recv_bytes().decode().split()
        source = self._sources.pop(int(number))
        self._verdicts[int(number)] = verdict == "right"
        if verdict == "late":
            self._give_up(source, f"did not end within {self._seconds:g} s")
        elif verdict == "crashed":
            self._give_up(source, "crashed")

    def _lose(self, server: _Server) -> None:
        """All that a server had to grade when it died is wrong; the next answer gets another."""
        for number, source in self._sources.items():
            self._verdicts[number] = False
            self._give_up(source, "crashed")
        self._sources.clear()
        server.end()
        self._server = None

    def _give_up(self, source: str, reason: str) -> None:
        self.ungraded += 1
        logger.warning("%s: grading an answer %s; it counts as wrong", source, reason)

    def _running(self) -> _Server:
        if self._server is None or self._server.process.poll() is not None:
            if self._server is not None:
                self._lose(self._server)
            self._server = _start(self._target)
            weakref.finalize(self, _Server.end, self._server)
        return self._server


def _start(target: tuple[Any, ...]) -> _Server:
    # Neither a fork, which threads and CUDA do not survive, nor a `multiprocessing` process, which
    # imports the main script again. In a session of its own: Ctrl-C is for the run to handle.
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", _START, str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            # The order of sets decides what some simplifications come to.
            env={**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
    server = _Server(process, Connection(ours.detach()))
    try:
        server.connection.send(sys.path)
        server.connection.send(target)
        server.connection.recv_bytes()
    except BaseException as error:
        server.end()
        if isinstance(error, (EOFError, OSError)):
            raise RuntimeError("the grader did not start; its process says why on stderr") from None
        raise
    return server


def _num_cpus() -> int:
    with contextlib.suppress(AttributeError):  # Linux only
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
