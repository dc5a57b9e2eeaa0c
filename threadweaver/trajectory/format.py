"""Where a trajectory breaks the format, and how (docs/semantics.md, "Trajectory")."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from threadweaver.trajectory.parser import Block, Tag, Thread, parse
from threadweaver.trajectory.tags import MAX_OUTLINES, TAGS

# No tag of any name may stand inside a block.
_ANY_TAG = re.compile(r"</?[A-Za-z]\w*>")
_OUTLINE = re.compile(r"\s*([0-9]+)\s*:(.*)", re.DOTALL)
_HEADER = re.compile(r"\s*([0-9]+)\s*:")

# Which tags may follow a tag of a block. A thread is one item: entered by <Thread>, left by
# </Thread>.
_NEXT = {
    "<Parallel>": ("<Outlines>",),
    "<Outlines>": ("<Outline>",),
    "<Outline>": ("</Outline>",),
    "</Outline>": ("<Outline>", "</Outlines>"),
    "</Outlines>": ("<Thread>",),
    "</Thread>": ("<Thread>", "<Conclusion>", "</Parallel>"),
    "<Conclusion>": ("</Conclusion>",),
    "</Conclusion>": ("</Parallel>",),
}


class Violation(NamedTuple):
    """A breach of the format.

    Attributes:
        line: where and what, "line n: ..."; without the number where the whole text lacks it.
        at: the character of the text that it was found at.
    """

    line: str
    at: int


def check_format(
    text: str,
    allow_space_between_threads: bool = False,
    require_parallel: bool = False,
    *,
    max_depth: int = 1,
) -> list[str]:
    """The violations of the format, one line each; empty if the text is well formed.

    The arguments are those of `find_violations`.
    """
    found = find_violations(
        text, allow_space_between_threads, require_parallel, max_depth=max_depth
    )
    return [violation.line for violation in found]


def find_violations(
    text: str,
    allow_space_between_threads: bool = False,
    require_parallel: bool = False,
    *,
    max_depth: int = 1,
) -> list[Violation]:
    """The violations of the format and where they are; empty if the text is well formed.

    Args:
        text: a response, or any text that holds one. <think> and </think> must both be there or
            neither: if the prompt ends with <think>, put it in front.
        allow_space_between_threads: accept white space between </Thread> and <Thread>.
        require_parallel: a text without a block is a violation.
        max_depth: how deep blocks may nest.
    """
    tags = [Tag(m[0], m.start(), m.end()) for m in _ANY_TAG.finditer(text)]
    # One level more than is allowed, so that a block too deep is seen as such.
    main = parse(tags, 0, len(text), max_depth + 1)
    check = _Check(text, tags, allow_space_between_threads, max_depth)
    if require_parallel and not main.blocks:
        check.problems.append(Violation("there is no <Parallel> block", 0))
    check.main_line(main)
    return check.problems


def violations(prompt: str, response: str, max_depth: int = 1) -> list[str]:
    """The violations in a response, of which a <think> that the prompt ends with is a part."""
    return check_format(opened_thinking(prompt) + response, max_depth=max_depth)


def opened_thinking(prompt: str) -> str:
    """The <think> that a prompt ends with, or nothing."""
    return "<think>" if prompt.rstrip().endswith("<think>") else ""


class _Check:
    def __init__(self, text: str, tags: list[Tag], allow_space: bool, max_depth: int):
        self.problems: list[Violation] = []
        self._text = text
        self._tags = tags
        self._allow_space = allow_space
        self._max_depth = max_depth

    def main_line(self, main: Thread) -> None:
        open_thinks: list[Tag] = []
        for tag in self._tags_outside_blocks(main, 0, len(self._tags)):
            if tag.name == "<think>":
                open_thinks.append(tag)
            elif tag.name == "</think>" and open_thinks:
                open_thinks.pop()
            elif tag.name == "</think>":
                self._report(tag.start, "</think> closes no <think>")
            elif tag.name in TAGS:
                self._report(tag.start, f"{tag.name} stands outside any block")
        for tag in open_thinks:
            self._report(tag.start, "<think> is never closed")
        self._blocks(main, "", 1)

    def _blocks(self, thread: Thread, prefix: str, depth: int) -> None:
        for i, block in enumerate(thread.blocks, 1):
            name = f"{prefix}block {i}"
            if depth <= self._max_depth:
                self._block(block, name, depth)
            else:
                start = self._tags[block.first_tag].start
                problem = f"{name} is nested too deep: at most {self._max_depth} (max_depth)"
                self._report(start, problem)

    def _block(self, block: Block, name: str, depth: int) -> None:
        if not self._parts_in_order(block, name):
            return  # what follows from a missing tag would hide the cause
        numbers = self._outline_numbers(block, name)
        if len(block.threads) != len(numbers):
            counts = f"{len(numbers)} outlines but {len(block.threads)} threads"
            self._report(self._tags[block.first_tag].start, f"{name} has {counts}")
        numbers += map(str, range(len(numbers) + 1, len(block.threads) + 1))
        for i, (thread, number) in enumerate(zip(block.threads, numbers, strict=False), 1):
            self._thread(thread, f"{name}, thread {i}", number, depth)
        for left, right in pairwise(block.threads):
            between = self._text[left.end : right.start]
            if between and not (self._allow_space and between.isspace()):
                found = self._quote(left.end, right.start)
                self._report(left.end, f"{name} has {found} between threads: nothing may be")

    def _parts_in_order(self, block: Block, name: str) -> bool:
        """Whether the tags of a block come in the order that _NEXT allows, all closed."""
        previous = "<Parallel>"
        for part in self._parts(block):
            if isinstance(part, Thread) and part.body_end == part.end:
                self._report(part.start, f"{name} has a thread that no </Thread> closes")
                return False
            tag = self._tags[part.first_tag] if isinstance(part, Thread) else part
            if tag.name not in _NEXT[previous]:
                expected = " or ".join(_NEXT[previous])
                problem = f"{name} has {tag.name} after {previous}: expected {expected}"
                self._report(tag.start, problem)
                return False
            previous = "</Thread>" if isinstance(part, Thread) else tag.name
        if previous != "</Parallel>":
            expected = " or ".join(_NEXT[previous])
            problem = f"{name} is cut off after {previous}: expected {expected}"
            self._report(self._tags[block.first_tag].start, problem)
        return previous == "</Parallel>"

    def _outline_numbers(self, block: Block, name: str) -> list[str]:
        """Numbers of the outlines of a block whose parts are in order; checks each outline."""
        tags = [part for part in self._parts(block) if isinstance(part, Tag)]
        opened = [tag for tag in tags if tag.name == "<Outline>"]
        closed = [tag for tag in tags if tag.name == "</Outline>"]
        if len(opened) > MAX_OUTLINES:
            problem = f"{name} has {len(opened)} outlines: at most {MAX_OUTLINES} are allowed"
            self._report(opened[0].start, problem)
        numbers = []
        for i, (left, right) in enumerate(zip(opened, closed, strict=True), 1):
            outline = _OUTLINE.fullmatch(self._text, left.end, right.start)
            where = f"{name}, outline {i}"
            if not outline:
                found = self._quote(left.end, right.start)
                self._report(left.start, f"{where} must read '{i}: text', found {found}")
            elif outline[1] != str(i):
                found = self._quote(*outline.span(1))
                problem = f"{where} is numbered {found}: outlines count 1, 2, 3, ..."
                self._report(left.start, problem)
            elif not outline[2].strip():
                self._report(left.start, f"{where} has no text after '{i}:'")
            numbers.append(outline[1] if outline else str(i))
        return numbers

    def _thread(self, thread: Thread, name: str, number: str, depth: int) -> None:
        header = _HEADER.match(self._text, thread.body_start, thread.body_end)
        if not header or header[1] != number:
            found = self._quote(thread.body_start, thread.body_end)
            self._report(thread.start, f"{name} must begin with '{number}:', found {found}")
        inner = self._tags_outside_blocks(thread, thread.first_tag + 1, thread.last_tag - 1)
        for tag in inner:
            self._report(tag.start, f"{name} holds {tag.name}: no tag may stand inside a thread")
            break  # the rest is most likely of the same piece
        self._blocks(thread, f"{name}, ", depth + 1)

    def _parts(self, block: Block) -> Iterator[Tag | Thread]:
        """Tags of a block after its <Parallel>, each thread as one part."""
        first = block.first_tag + 1
        for thread in block.threads:
            yield from self._tags[first : thread.first_tag]
            yield thread
            first = thread.last_tag
        yield from self._tags[first : block.last_tag]

    def _tags_outside_blocks(self, thread: Thread, first: int, last: int) -> Iterator[Tag]:
        for block in thread.blocks:
            yield from self._tags[first : block.first_tag]
            first = block.last_tag
        yield from self._tags[first:last]

    def _quote(self, start: int, end: int) -> str:
        text = self._text[start:end]
        return repr(text if len(text) <= 40 else text[:37] + "...")

    def _report(self, offset: int, problem: str) -> None:
        line = self._text.count("\n", 0, offset) + 1
        self.problems.append(Violation(f"line {line}: {problem}", offset))
