"""Training commands on several ranks of this machine, over gloo.

The ranks are forked from a process that has imported all and run nothing, which saves each of them
the seconds that imports take.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any
from unittest.mock import patch

from threadweaver import rank_errors

_context: Any = get_context("forkserver")
_context.set_forkserver_preload(["threadweaver.train.pipeline", "threadweaver.rank_errors"])


@dataclass
class Ended:
    """How a run ended.

    Attributes:
        codes: exit codes by rank; negative: the signal that killed it.
        out: what all ranks wrote to stdout.
        err: to stderr.
    """

    codes: list[int]
    out: str
    err: str

    def one_line(self, code: int) -> str:
        """Checks that all ranks ended with this code, and with one line in all; returns it."""
        assert self.codes == [code] * len(self.codes), (self.codes, self.err)
        assert self.err.startswith("error: ") and self.err.count("\n") == 1, self.err
        return self.err


class Ranks:
    """Ranks that are running.

    Args:
        arguments: of the command, for all ranks, or for each rank its own.
        folder: for what they write.
        count: how many are started.
        size: how many there should be; default: as many.
        before: called in each rank, with its number, before the command.
        command: the package of the command.
        **env: of their environment.

    Attributes:
        processes: by rank.
    """

    def __init__(
        self,
        arguments: list[str] | list[list[str]],
        folder: Path,
        count: int,
        size: int | None = None,
        before: Callable[[int], None] | None = None,
        command: str = "threadweaver.train",
        **env: str,
    ):
        size = size or count
        # As threadweaver.train.__main__ has it, before torch is loaded.
        with patch.dict(os.environ, TORCH_CPP_LOG_LEVEL="ERROR"):
            ensure_running()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        each: Any = arguments if isinstance(arguments[0], list) else [arguments] * count
        self._files = [folder / f"rank-{rank}" for rank in range(count)]
        self.processes = []
        for rank, file in enumerate(self._files):
            variables = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(size),
                "LOCAL_WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                **env,
            }
            process = _context.Process(
                target=_run, args=(command, each[rank], str(file), variables, before)
            )
            process.start()
            self.processes.append(process)

    def are_running(self) -> bool:
        """All of them."""
        return all(process.exitcode is None for process in self.processes)

    def wait(self, seconds: float = 120) -> Ended:
        """Until all have ended."""
        for process in self.processes:
            process.join(seconds)
        try:
            assert all(p.exitcode is not None for p in self.processes), self._text("err")
        finally:
            for process in self.processes:
                process.kill()
        codes = [process.exitcode for process in self.processes]
        return Ended(codes, self._text("out"), self._text("err"))

    def _text(self, kind: str) -> str:
        return "".join(file.with_suffix(f".{kind}").read_text() for file in self._files)


def fails_alike(rank: int) -> None:
    """To be called before a command that ends all ranks with the same line: the first to fail waits
    for the others however busy the machine is. They end as soon as all have failed."""
    rank_errors.SAME_SECONDS = 60.0


def _run(
    command: str,
    arguments: list[str],
    file: str,
    variables: dict[str, str],
    before: Callable[[int], None] | None,
) -> None:
    os.environ.update(variables)
    for stream, suffix in ((sys.stdout, ".out"), (sys.stderr, ".err")):
        os.dup2(os.open(file + suffix, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())
    import torch

    main = import_module(f"{command}.__main__").main
    torch.set_num_threads(1)
    if before is not None:
        before(int(variables["RANK"]))
    code = main(arguments)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(code)  # as a command does, without the atexit of what was forked


def on_ranks(arguments: list[str] | list[list[str]], folder: Path, count: int, **more) -> Ended:
    """Runs a command on so many ranks to the end; arguments as those of `Ranks`."""
    return Ranks(arguments, folder, count, **more).wait()
