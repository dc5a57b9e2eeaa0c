"""The pool of KV pages, and the page tables of sequences (docs/architecture.md, facts 6 and 7).

Bookkeeping on the host: where keys and values lie, and which pages the device has to copy.
Invariant: only slots past the end of a sequence are written, and only in pages that no other
sequence holds. A forked sequence shares all pages of its origin, the last, partly filled one too: a
sequence that appends to a shared page moves to a copy of it, and the last holder writes in place.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class OutOfPages(RuntimeError):  # noqa: N818 (a state that a scheduler resolves, not an error)
    """The pool lacks pages for what was asked; nothing has changed."""


class PageTable:
    """Where the tokens of one sequence lie; starts empty.

    Token i lies in slot i % page_size of pages[i // page_size]. Only a PagePool changes it.

    Attributes:
        pages: page numbers in order, int32. A buffer: np.array(pages) copies it fast. A view must
            not outlive the next append, which may move it.
        length: number of tokens.
    """

    __slots__ = ("length", "pages")

    def __init__(self) -> None:
        self.pages = array("i")
        self.length = 0


class Copy(NamedTuple):
    """The first `tokens` slots of page `source` go to the same slots of page `target`."""

    source: int
    target: int
    tokens: int


class PagePool:
    """Counts for every page how many tables hold it.

    The device must run the copies and writes of one append before those of the next: a page that
    was released in between may be handed out again.

    Args:
        num_pages: pages are numbered from 0.
        page_size: tokens a page holds.

    Raises:
        ValueError: either is less than 1.
    """

    def __init__(self, num_pages: int, page_size: int):
        if num_pages < 1:
            raise ValueError(f"num_pages is {num_pages}: it must be at least 1")
        if page_size < 1:
            raise ValueError(f"page_size is {page_size}: it must be at least 1")
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))
        # The same memory twice: Python reads single counts from the array, NumPy many at once.
        self._holders = array("i", bytes(array("i").itemsize * num_pages))
        self._all_holders = np.frombuffer(self._holders, dtype=np.int32)

    @property
    def free_pages(self) -> int:
        return len(self._free)

    def append(self, tables: Sequence[PageTable], counts: Sequence[int]) -> list[Copy]:
        """Lengthens each table by its count of tokens.

        Returns:
            The copies that the device makes before it writes the new tokens, at most one a table.

        Args:
            tables: different ones.
            counts: as many, each at least 0.

        Raises:
            OutOfPages: the pool lacks pages for all of them together; nothing has changed.
            ValueError: counts do not fit the tables, or a table stands there twice.
        """
        if len(tables) != len(counts):
            raise ValueError(f"{len(counts)} counts were given for {len(tables)} tables")
        if len(set(map(id, tables))) != len(tables):
            raise ValueError("a table stands twice in one append: add up its counts")
        if counts and min(counts) < 0:
            raise ValueError(f"counts hold {min(counts)}: each must be at least 0")
        needed = self._pages_needed(tables, counts)
        if needed > len(self._free):
            raise OutOfPages(f"{needed} pages are needed, {len(self._free)} are free")
        size, free, holders = self.page_size, self._free, self._holders
        copies: list[Copy] = []
        for table, count in zip(tables, counts, strict=True):
            if count == 0:
                continue
            pages, used = table.pages, table.length % size
            table.length += count
            if used and holders[pages[-1]] > 1:
                copies.append(Copy(pages[-1], free[-1], used))
                holders[pages[-1]] -= 1
                pages[-1] = free.pop()
                holders[pages[-1]] = 1
            while len(pages) * size < table.length:
                holders[free[-1]] = 1
                pages.append(free.pop())
        return copies

    def drop_last(self, table: PageTable) -> None:
        """Takes the last token off a table, and its page if it was the first in it."""
        table.length -= 1
        if table.length % self.page_size == 0:
            page = table.pages.pop()
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._free.append(page)

    def fork(self, table: PageTable, length: int | None = None) -> PageTable:
        """Another sequence of the first `length` tokens, by default all; takes no page."""
        copy = PageTable()
        copy.length = table.length if length is None else min(length, table.length)
        copy.pages = table.pages[: -(-copy.length // self.page_size)]
        self._all_holders[copy.pages] += 1
        return copy

    def adopt(self, table: PageTable, source: PageTable) -> None:
        """Releases the table and gives it the pages and tokens of the source, which ends up empty.

        At a join the line that forked takes over thread 1's table (docs/architecture.md, fact 7).
        """
        if table is source:
            return
        self.release(table)
        table.pages, table.length = source.pages, source.length
        source.pages, source.length = array("i"), 0

    def release(self, table: PageTable) -> None:
        """Empties the table; pages that no other table holds are free again."""
        pages = np.array(table.pages, np.int32)
        table.pages, table.length = array("i"), 0
        self._all_holders[pages] -= 1
        self._free.extend(pages[self._all_holders[pages] == 0].tolist())

    def _pages_needed(self, tables: Sequence[PageTable], counts: Sequence[int]) -> int:
        size, holders = self.page_size, self._holders
        needed = 0
        # Tables of this append that leave a shared page: all its holders may, but for the last.
        leaving: dict[int, int] = {}
        for table, count in zip(tables, counts, strict=True):
            if count == 0:
                continue
            pages, start = table.pages, table.length
            needed += -(-(start + count) // size) - len(pages)
            if start % size and holders[pages[-1]] > 1:
                leaving[pages[-1]] = leaving.get(pages[-1], 0) + 1
        return needed + sum(min(n, holders[page] - 1) for page, n in leaving.items())
