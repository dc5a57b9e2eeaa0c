"""Ctrl-C and termination: finish what is under way, then stop; a second time, stop at once."""

from __future__ import annotations

import signal
from types import FrameType


class Interrupts:
    """While entered, the first SIGINT or SIGTERM sets `received`; a second one raises.

    Attributes:
        received: number of the signal, None before.
    """

    received: int | None = None

    def __enter__(self) -> Interrupts:
        self._old = {s: signal.signal(s, self._receive) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number
