"""Step 2: groups become blocks, their lines verbatim. No teacher takes part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from threadweaver.annotate.map import Range

MIN_CHARACTERS = 200  # of all threads but the longest: below it there is nothing to gain


@dataclass
class Block:
    """Units that are to be threads.

    Attributes:
        threads: the text of each, with the white space that follows it.
        lines: of the reasoning, that they were cut from.
        outlines: one a thread, once there are some.
    """

    threads: list[str]
    lines: str
    outlines: list[str] = field(default_factory=list)


Segment = str | Block  # a reasoning is a list of these


@dataclass(frozen=True)
class Dropped:
    """A group that became no block."""

    ranges: list[Range]
    reason: str


def cut(lines: Sequence[str], groups: Sequence[list[Range]]) -> tuple[list[Segment], list[Dropped]]:
    """The reasoning in segments, which put together are its lines, and the groups dropped."""
    dropped: list[Dropped] = []
    kept: list[list[Range]] = []
    for group in sorted(groups):
        reason = _why_not(lines, group)
        if reason is None and kept and group[0][0] <= kept[-1][-1][1]:
            reason = "it overlaps another group"
        if reason is None:
            kept.append(group)
        else:
            dropped.append(Dropped(group, reason))
    segments: list[Segment] = []
    at = 1
    for group in kept:
        if text := _text(lines, at, group[0][0] - 1):
            segments.append(text)
        threads = [_text(lines, *unit) for unit in group]
        segments.append(Block(threads, "".join(threads)))
        at = group[-1][1] + 1
    if text := _text(lines, at, len(lines)):
        segments.append(text)
    return segments, dropped


def _why_not(lines: Sequence[str], group: Sequence[Range]) -> str | None:
    if len(group) < 2:
        return "it has fewer than two threads"
    if any(not 1 <= first <= last <= len(lines) for first, last in group):
        return "a range is none of the lines"
    for (_, last), (first, _) in pairwise(group):
        if first <= last:
            return "its ranges overlap"
        if first > last + 1:
            return "its ranges leave lines out"
    lengths = [len(_text(lines, *unit).strip()) for unit in group]
    if sum(lengths) - max(lengths) < MIN_CHARACTERS:
        return f"all threads but the longest hold under {MIN_CHARACTERS} characters together"
    return None


def _text(lines: Sequence[str], first: int, last: int) -> str:
    return "".join(lines[first - 1 : last])


def plain(segments: Sequence[Segment]) -> str:
    """The text without tags."""
    return "".join(s if isinstance(s, str) else "".join(s.threads) for s in segments)


def marked_up(segments: Sequence[Segment]) -> str:
    """The text with its blocks as the format has them; each has its outlines."""
    text = ""
    for segment in segments:
        if isinstance(segment, str):
            text += segment
            continue
        if text and not text.endswith("\n"):
            text += "\n"
        outlines = "".join(
            f"<Outline>{n}: {outline}</Outline>\n" for n, outline in enumerate(segment.outlines, 1)
        )
        threads = "".join(
            f"<Thread>\n{n}: {thread.strip()}</Thread>"
            for n, thread in enumerate(segment.threads, 1)
        )
        text += f"<Parallel>\n<Outlines>\n{outlines}</Outlines>\n{threads}\n</Parallel>\n"
    return text
