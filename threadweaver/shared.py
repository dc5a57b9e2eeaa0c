"""What ranks tell each other while they work: through the store, without waiting for each other.

Names are made by `new_name`, which all ranks call in the same order. In one process nothing is
sent.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

from threadweaver import ranks

MOST_PAUSE = 0.25  # seconds between two looks at whether all have come

_names = itertools.count()


def new_name(what: str) -> str:
    """A name that was not used before, the same on all ranks."""
    return f"{what}/{next(_names)}"


class SharedCount:
    """A sum of whole numbers over all ranks.

    Args:
        name: see `new_name`.
    """

    def __init__(self, name: str):
        self._key = f"count/{name}"
        self._own = 0

    def add(self, amount: int) -> int:
        """Returns the sum so far."""
        store = ranks.store()
        if store is not None:
            return store.add(self._key, amount)
        self._own += amount
        return self._own


class Messages:
    """From the other ranks to the first, which gets each once.

    Args:
        name: see `new_name`.
    """

    def __init__(self, name: str):
        self._key = f"message/{name}"
        self._count = SharedCount(name)
        self._received = 0

    def send(self, message: str) -> None:
        store = ranks.store()
        assert store is not None
        store.set(f"{self._key}/{self._count.add(1) - 1}", message)

    def receive(self) -> list[str]:
        """What came since the last call, in the order of `send`."""
        store, count = ranks.store(), self._count.add(0)
        messages = []
        while store is not None and self._received < count:
            key = f"{self._key}/{self._received}"
            messages.append(store.get(key).decode())
            store.delete_key(key)
            self._received += 1
        return messages


def wait_for_all(on_wait: Callable[[], object]) -> None:
    """Returns when all ranks have called it. Meanwhile `on_wait` is called a few times a second:
    unlike a collective it may take any time, and Ctrl-C ends it."""
    here, pause = SharedCount(new_name("here")), 0.001
    here.add(1)
    while here.add(0) < ranks.size():
        on_wait()
        time.sleep(pause)
        pause = min(2 * pause, MOST_PAUSE)
