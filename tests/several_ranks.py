"""Several ranks in one process, for what they tell each other through the store alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch.distributed as dist

from threadweaver import ranks, shared


class SeveralRanks:
    """Attributes:
    size: how many they are.
    """

    def __init__(self, patch: pytest.MonkeyPatch, size: int):
        self.size, self._patch = size, patch
        self._store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        self._names = [itertools.count() for _ in range(size)]

    @contextmanager
    def rank(self, number: int) -> Iterator[None]:
        """Inside, this process is that rank."""
        with self._patch.context() as patch:
            patch.setattr(ranks, "_store", self._store)
            patch.setattr(ranks, "rank", lambda: number)
            patch.setattr(ranks, "size", lambda: self.size)
            patch.setattr(shared, "_names", self._names[number])
            yield
