"""How the ranks of a run end when one of them fails: with one line in all, and one exit code.

The rank that fails first says why, with its number, unless all fail with the same line. The others
end as soon as they see it: a thread of theirs looks at what the ranks share, since they themselves
may wait for that rank in a collective.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from torch.distributed import (
    DistError,
    PrefixStore,  # pyright: ignore[reportPrivateImportUsage]
    Store,  # pyright: ignore[reportPrivateImportUsage]
)

from threadweaver import command, ranks

# How often a rank looks whether another has failed, and how long the first to fail waits for the
# same line from the others, in seconds.
LOOK_SECONDS = 0.2
SAME_SECONDS = 1.0
LOST = "another rank has ended (killed, or its machine is gone): continue with --resume"


@contextmanager
def joined() -> Iterator[None]:
    """Inside, this process is one of the ranks that torchrun started; rank 0 alone is heard. What
    `command.fail` says ends all of them, as does an error that leaves the block."""
    try:
        store = ranks.join()
    except ranks.NotAllCame as error:
        code = 2 if error.is_told else command.fail(error, 2)
        if error.store is not None:
            ranks.go(error.store)
        sys.exit(code)
    except ValueError as error:
        sys.exit(command.fail(error, 2))
    end = _End(store)
    command.on_failure = end.all
    if not ranks.is_first():
        sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 (to the end)
    try:
        yield
        ranks.wait_for_all()
    except (OSError, MemoryError):
        raise  # said by `command`
    except Exception as error:
        if isinstance(error, RuntimeError):
            if command.is_out_of_memory(error):
                raise
            if ranks.is_lost(error):
                end.all(f"{LOST} ({ranks.in_one_line(error)})", 1, is_lost=True)
        end.all(f"{type(error).__name__}: {error}", 1, traceback.format_exc())
    end.watched.set()
    command.on_failure = None
    ranks.go(store)  # only now may the store be gone: a watcher would miss it
    ranks.leave()


class _End:
    """Attributes:
    watched: set when the other ranks need not be looked at any more.
    """

    def __init__(self, store: Store):
        self._store = store
        self.watched = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(ranks.another_client(),), daemon=True)
        watcher.start()

    def all(self, line: str, code: int, detail: str = "", is_lost: bool = False) -> NoReturn:
        """Ends this rank, and so all of them.

        Args:
            line: what was wrong.
            code: the exit code, if this rank is the first.
            detail: to be shown before it.
            is_lost: whether it is that another rank has ended.
        """
        self.watched.set()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # it is ending
        try:
            code = self._agree(line, code, detail, is_lost)
        except DistError:  # nobody is left to agree with
            _say(f"rank {ranks.rank()}: {line}", detail)
        _exit(code)

    def _agree(self, line: str, code: int, detail: str, is_lost: bool) -> int:
        """Says why if nobody does; returns the exit code of all."""
        store, rank, size = PrefixStore("end", self._store), ranks.rank(), ranks.size()
        store.set(f"line/{rank}", line)
        if store.add("failed", 1) == 1:
            ranks.becomes(lambda: store.add("failed", 0) == size, SAME_SECONDS)
            keys = [f"line/{other}" for other in range(size)]
            alike = store.check(keys) and {store.get(key) for key in keys} == {line.encode()}
            _say(line if alike else f"rank {rank}: {line}", detail)
            if is_lost:
                store.set("lost", "")
            store.set("code", str(code))
        else:
            code = self._code(store) or code
        self._go(self._store)
        return code

    def _code(self, store: Store) -> int | None:
        """That of the first rank that failed, once it has said why; None if it never does."""
        ranks.becomes(lambda: store.check(["code"]), SAME_SECONDS + ranks.GONE_SECONDS)
        return int(store.get("code")) if store.check(["code"]) else None

    def _go(self, store: Store) -> None:
        """See `ranks.go`; a rank that is lost is not waited for as long."""
        with suppress(DistError):
            is_lost = PrefixStore("end", store).check(["lost"])
            ranks.go(store, SAME_SECONDS if is_lost else None)

    def _watch(self, store: Store) -> None:
        end = PrefixStore("end", store)
        while not self.watched.wait(LOOK_SECONDS):
            try:
                if not end.check(["failed"]):
                    continue
                code = self._code(end) or 1
                if not self.watched.is_set():
                    self._go(store)
            except DistError:
                # The store was in the process of a rank that ended: was it the end of all?
                if self.watched.wait(SAME_SECONDS):
                    return
                _say(f"rank {ranks.rank()}: {LOST}", "")
                code = 1
            if not self.watched.is_set():
                _exit(code)


def _say(line: str, detail: str) -> None:
    stream = sys.__stderr__
    with suppress(OSError):
        if stream is not None:
            print(f"{detail}error: {line}", file=stream, flush=True)


def _exit(code: int) -> NoReturn:
    """At once: a collective that waits for a rank that is gone would never end."""
    with suppress(OSError, ValueError):
        if sys.stdout.isatty():
            sys.stdout.write("\x1b[?25h")  # a progress bar hides the cursor
        sys.stdout.flush()
    os._exit(code)
