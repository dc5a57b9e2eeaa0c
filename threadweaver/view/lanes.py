"""A response as lanes: what is decoded one after another, and the threads of a block side by side.

As JSON, nothing of the text left out:

    line    [text | block, ...]
    text    {"s": [string or number of a mark, ...], "n": length}
    block   {"b": [text | thread, ...], "n": length of its longest thread}
    thread  {"t": line, "n": length, "r": [repeated, grams], "k": whether it is the longest,
             "open": text, "close": text}

The length of a line is that of its own longest path (docs/semantics.md, "Path metrics").
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from threadweaver.trajectory import Codec
from threadweaver.trajectory.parser import Block, Tag, Thread, parse
from threadweaver.trajectory.redundancy import block_redundancy, count_words, find_tags

# Deeper ones are shown as literal text; no page has room for them.
MOST_LEVELS = 8

Json = dict[str, Any]
Measure = Callable[[str], int]


class Lanes(NamedTuple):
    """A response, taken apart.

    Attributes:
        line: as above.
        total, longest: its lengths.
        threads: how many threads there are in all.
        repeated, grams: of all threads (threadweaver.trajectory.redundancy).
    """

    line: list[Json]
    total: int
    longest: int
    blocks: int
    threads: int
    repeated: int
    grams: int


def lanes(text: str, marks: Sequence[int], measure: Measure = count_words) -> Lanes:
    """Takes a response apart.

    Args:
        marks: characters to mark; a mark's number is its place in this list.
        measure: the length of a piece of text. Pieces are parted at tags and thread headers alone.
    """
    tags = find_tags(text)
    return _Parts(text, tags, marks, measure).lanes(parse(tags, 0, len(text), MOST_LEVELS))


def tokens_of(codec: Codec) -> Measure:
    """Lengths in tokens of a tokenizer."""
    return lambda text: len(codec.encode(text))


class _Parts:
    def __init__(self, text: str, tags: list[Tag], marks: Sequence[int], measure: Measure):
        self._text, self._tags, self._measure = text, tags, measure
        # None may lie behind the last character.
        last = max(len(text) - 1, 0)
        self._marks = sorted((max(0, min(at, last)), n) for n, at in enumerate(marks))
        self._total = self._blocks = self._threads = self._repeated = self._grams = 0

    def lanes(self, main: Thread) -> Lanes:
        line, longest = self._line(main)
        counts = self._blocks, self._threads, self._repeated, self._grams
        return Lanes(line, self._total, longest, *counts)

    def _line(self, thread: Thread) -> tuple[list[Json], int]:
        parts: list[Json] = []
        start, length = thread.body_start, 0
        for block in thread.blocks:
            first = self._tags[block.first_tag].start
            # An unclosed one ends with what there is of it.
            end = max(self._tags[block.last_tag - 1].end, *(t.end for t in block.threads), first)
            found, longest = self._block(block, first, end)
            before = self._piece(start, first)
            parts += [*before, found]
            length += sum(part["n"] for part in before) + longest
            start = end
        rest = self._piece(start, thread.body_end)
        return [*parts, *rest], length + sum(part["n"] for part in rest)

    def _block(self, block: Block, start: int, end: int) -> tuple[Json, int]:
        """A block as JSON, and its length."""
        self._blocks += 1
        self._threads += len(block.threads)
        parts: list[Json] = []
        length, threads = 0, []
        for thread, twice in zip(
            block.threads, block_redundancy(self._text, block.threads), strict=True
        ):
            self._repeated += twice.repeated
            self._grams += twice.grams
            between = self._piece(start, thread.start)
            opened = self._piece(thread.start, thread.body_start)
            line, longest = self._line(thread)
            closed = self._piece(thread.body_end, thread.end)
            length += sum(part["n"] for part in (*between, *opened, *closed))
            threads.append(
                {"t": line, "n": longest, "r": [*twice], "open": opened, "close": closed}
            )
            parts += [*between, threads[-1]]
            start = thread.end
        rest = self._piece(start, end)
        length += sum(part["n"] for part in rest)
        longest = max((thread["n"] for thread in threads), default=0)
        if threads:
            next(t for t in threads if t["n"] == longest)["k"] = 1
        return {"b": [*parts, *rest], "n": longest}, length + longest

    def _piece(self, start: int, end: int) -> list[Json]:
        """A text between two positions, its marks in their places; nothing if it is empty."""
        if start >= end:
            return []
        length = self._length(start, end)
        self._total += length
        pieces: list[str | int] = []
        first, last = (bisect_left(self._marks, (at, -1)) for at in (start, end))
        for at, number in self._marks[first:last]:
            pieces += [self._text[start:at], number] if at > start else [number]
            start = at
        return [{"s": [*pieces, self._text[start:end]], "n": length}]

    def _length(self, start: int, end: int) -> int:
        """A header is parted from what follows it by the tag before it alone."""
        opened = "<Thread>"
        if self._text.endswith(opened, 0, start):
            return self._measure(opened + self._text[start:end]) - self._measure(opened)
        return self._measure(self._text[start:end])
