"""Ctrl-C, termination, a terminal that closes: finish what is under way, then stop; a second time,
or where nothing can be saved in between, stop at once."""

from __future__ import annotations

import signal
import time
from types import FrameType

from threadweaver import ranks

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ECHO_SECONDS = 3.0


class Interrupted(KeyboardInterrupt):
    """Stopped at once by the signal `number`."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class Interrupts:
    """While entered, the first signal of SIGNALS sets `received`; a second one raises Interrupted.
    One that is ignored stays so (nohup). On several ranks a second one within ECHO_SECONDS is the
    first: at Ctrl-C a rank gets one from the terminal and one from torchrun.

    Args:
        at_once: the first one raises too.

    Attributes:
        received: number of the signal, None before.
    """

    received: int | None = None
    _at = 0.0

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
        if self._at_once:
            raise Interrupted(number)
        is_echo = ranks.size() > 1 and time.monotonic() - self._at < ECHO_SECONDS
        if self.received is not None and not is_echo:
            raise Interrupted(number)
        if self.received is None:
            self.received, self._at = number, time.monotonic()


def exit_code(error: KeyboardInterrupt) -> int:
    """128 + the signal."""
    return 128 + (error.number if isinstance(error, Interrupted) else signal.SIGINT)
