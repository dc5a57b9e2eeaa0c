"""Ctrl-C, termination, a terminal that closes: finish what is under way, then stop; a second time,
or where nothing can be saved in between, stop at once."""

from __future__ import annotations

import signal
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """Stopped at once by the signal `number`."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class Interrupts:
    """While entered, the first signal of SIGNALS sets `received`; a second one raises Interrupted.
    One that is ignored stays so (nohup).

    Args:
        at_once: the first one raises too.

    Attributes:
        received: number of the signal, None before.
    """

    received: int | None = None

    def __init__(self, at_once: bool = False):
        self._at_once = at_once

    def __enter__(self) -> Interrupts:
        heeded = [s for s in SIGNALS if signal.getsignal(s) != signal.SIG_IGN]
        self._old = {s: signal.signal(s, self._receive) for s in heeded}
        return self

    def __exit__(self, *exc) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._at_once or self.received is not None:
            raise Interrupted(number)
        self.received = number


def exit_code(error: KeyboardInterrupt) -> int:
    """128 + the signal."""
    return 128 + (error.number if isinstance(error, Interrupted) else signal.SIGINT)
