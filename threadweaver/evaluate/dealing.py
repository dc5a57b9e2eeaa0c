"""Which problems a rank decodes: a share to start with, then what it takes of those left over."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from threadweaver import ranks
from threadweaver.shared import new_name


class Dealing:
    """Problems dealt to ranks, one by one; all ranks make it together.

    Every rank has `most` of them to start with, or its share if that is less, so that none waits
    for another to begin. The others lie in a queue, of which ranks that are done earlier take more.

    Args:
        numbers: of the problems, the same on all ranks.
        most: how many a rank starts with at most.

    Attributes:
        start: this rank's, in order.
    """

    def __init__(self, numbers: Sequence[int], most: int):
        size = ranks.size()
        dealt = min(most, -(-len(numbers) // size)) * size
        self.start = list(numbers[ranks.rank() : dealt : size])
        self._left = numbers[dealt:]
        self._queue = ranks.SharedQueue(new_name("problems"), len(self._left))
        self._is_empty = not self._left

    def take(self) -> int | None:
        """The next problem; None if none is left."""
        if self._is_empty:
            return None
        at = self._queue.take()
        self._is_empty = at is None
        return None if at is None else self._left[at]

    def take_up_to(self, count: int) -> list[int]:
        return list(islice(iter(self.take, None), count))
