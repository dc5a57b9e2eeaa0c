"""Ctrl-C, termination, a terminal that closes: finish what is under way, then stop; a second time,
stop at once."""

from __future__ import annotations

import signal
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """While entered, the first signal of SIGNALS sets `received`; a second one raises. One that is
    ignored stays so (nohup).

    Attributes:
        received: number of the signal, None before.
    """

    received: int | None = None

    def __enter__(self) -> Interrupts:
        heeded = [s for s in SIGNALS if signal.getsignal(s) != signal.SIG_IGN]
        self._old = {s: signal.signal(s, self._receive) for s in heeded}
        return self

    def __exit__(self, *exc) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number
