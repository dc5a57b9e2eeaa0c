"""How much of its threads a response says twice (docs/semantics.md, "Path metrics")."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from threadweaver.trajectory.parser import Tag, Thread, parse
from threadweaver.trajectory.tags import TAGS, THREAD_HEADER

N = 8
_TAG = re.compile("|".join(map(re.escape, TAGS)))
# What no 8-gram runs across: tags, and the header that is forced after <Thread>.
_BREAK = re.compile(f"<Thread>{THREAD_HEADER.pattern}|{_TAG.pattern}")
_WORD = re.compile(r"\w+|[^\w\s]")

Gram = tuple[str, ...]


class Redundancy(NamedTuple):
    """8-grams of threads.

    Attributes:
        repeated: those that stand in a sibling too.
        grams: all of them, equal ones counted each time.
    """

    repeated: int
    grams: int

    @property
    def share(self) -> float | None:
        """repeated / grams; None where no thread has eight words."""
        return self.repeated / self.grams if self.grams else None


def redundancy(text: str, *, max_depth: int = 1) -> Redundancy:
    """Of all threads of a response; a sibling is another thread of the same block.

    Words are compared, not tokens, so that models with different tokenizers can be: a run of
    letters and digits, or any other character that is not white space. Tags and thread headers are
    no words, and no 8-gram runs across one.

    Args:
        max_depth: how deep blocks nest. What stands in a nested block is a part of the thread
            around it too.
    """
    main = parse(find_tags(text), 0, len(text), max_depth)
    found = [o for block in main.all_blocks() for o in block_redundancy(text, block.threads)]
    return Redundancy(sum(one.repeated for one in found), sum(one.grams for one in found))


def block_redundancy(text: str, threads: Sequence[Thread]) -> list[Redundancy]:
    """Of each thread of a block of the text."""
    grams = [Counter(_grams(text[t.start : t.end])) for t in threads]
    holders = Counter(gram for own in grams for gram in own)
    return [
        Redundancy(sum(n for gram, n in own.items() if holders[gram] > 1), own.total())
        for own in grams
    ]


def find_tags(text: str) -> list[Tag]:
    """The tags of a response, for `parse`; positions are characters."""
    return [Tag(m[0], m.start(), m.end()) for m in _TAG.finditer(text)]


def count_words(text: str) -> int:
    """Words as above; a tag is one."""
    return sum(len(_WORD.findall(piece)) for piece in _TAG.split(text)) + len(_TAG.findall(text))


def _grams(text: str) -> Iterator[Gram]:
    for piece in _BREAK.split(text):
        words = _WORD.findall(piece)
        yield from zip(*(words[i:] for i in range(N)), strict=False)
