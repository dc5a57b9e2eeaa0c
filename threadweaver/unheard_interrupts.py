"""Interrupts that Python loses: an exception of a signal's handler that comes in a weak reference's
callback or in `__del__` is printed and ignored."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SECONDS = 0.05  # until the callback is surely over


@contextmanager
def repeated() -> Iterator[None]:
    """Inside, the signal of an interrupt that would be lost comes again, and nothing is printed."""
    before, timers = sys.unraisablehook, []

    def hook(unraisable: Any) -> None:
        error = unraisable.exc_value
        if not isinstance(error, KeyboardInterrupt):
            before(unraisable)
            return
        number = getattr(error, "number", signal.SIGINT)
        timers.append(threading.Timer(SECONDS, os.kill, (os.getpid(), number)))
        timers[-1].daemon = True
        timers[-1].start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
        for timer in timers:
            timer.cancel()
