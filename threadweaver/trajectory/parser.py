"""Parses the blocks and threads of a trajectory, well formed or not, from its tags.

The parser sees the positions of tags alone, so it serves both token ids (positions are indices) and
text (positions are characters). It never fails: a tag that opens or closes nothing at its place is
literal content. As in the state machine, a thread runs to the next </Thread>, and the threads that
come after an </Outlines> are those it opens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Tag(NamedTuple):
    """A tag and the half-open range of positions it takes."""

    name: str
    start: int
    end: int


@dataclass
class Thread:
    """A thread, or the main line (the trajectory itself), as half-open ranges of positions.

    Attributes:
        start, end: the whole, with its own tags.
        body_start, body_end: what is between its tags; body_end == end if it was never closed.
        first_tag, last_tag: tags[first_tag:last_tag] lie in [start, end).
        blocks: the blocks directly inside it.
        forks: each </Outlines> directly inside it.
    """

    start: int
    end: int
    body_start: int
    body_end: int
    first_tag: int
    last_tag: int
    blocks: list[Block] = field(default_factory=list)
    forks: list[Fork] = field(default_factory=list)

    def all_blocks(self) -> Iterator[Block]:
        """The blocks inside it, those in their threads too, in the order in which they begin."""
        for block in self.blocks:
            yield block
            for thread in block.threads:
                yield from thread.all_blocks()


@dataclass
class Block:
    """<Parallel> … </Parallel>, tags[first_tag:last_tag], and the threads directly inside it."""

    first_tag: int
    last_tag: int
    threads: list[Thread] = field(default_factory=list)


@dataclass
class Fork:
    """The position right after an </Outlines>, and the threads opened there; maybe none."""

    at: int
    threads: list[Thread] = field(default_factory=list)


def parse(tags: Sequence[Tag], start: int, end: int, max_depth: int) -> Thread:
    """Main line of a trajectory that spans positions [start, end).

    Args:
        tags: the tags in that range, in order; names other than those of blocks are ignored.
        max_depth: how deep blocks nest: 1, one level only; 0, every tag is literal.

    Raises:
        ValueError: max_depth is negative.
    """
    if max_depth < 0:
        raise ValueError(f"max_depth is {max_depth}: it must be at least 0")
    main = Thread(start, end, body_start=start, body_end=end, first_tag=0, last_tag=len(tags))
    _fill(main, tags, 0, max_depth, closed_by=None)
    return main


def _fill(thread: Thread, tags: Sequence[Tag], i: int, levels: int, closed_by: str | None) -> None:
    """Parses tags[i:] into a thread that reaches the end of the trajectory unless closed earlier.

    `levels` says how many levels of blocks may still nest inside it.
    """
    block: Block | None = None
    fork: Fork | None = None
    while i < len(tags):
        name, start, end = tags[i]
        i += 1
        if name == closed_by:
            thread.body_end, thread.end, thread.last_tag = start, end, i
            if block is not None:
                block.last_tag = i - 1
            return
        if levels == 0:
            continue
        if name == "<Parallel>" and block is None:
            block = Block(i - 1, len(tags))
            fork = None
            thread.blocks.append(block)
        elif name == "</Parallel>" and block is not None:
            block.last_tag = i
            block = None
        elif name == "</Outlines>":
            fork = Fork(end)
            thread.forks.append(fork)
        elif name == "<Thread>" and block is not None:
            child = Thread(start, thread.end, end, thread.end, i - 1, len(tags))
            _fill(child, tags, i, levels - 1, closed_by="</Thread>")
            i = child.last_tag
            block.threads.append(child)
            if fork is not None:
                fork.threads.append(child)
