"""The reasoning of a response, line by line."""

from __future__ import annotations

import re
from dataclasses import dataclass

from threadweaver.annotate.failures import LeftOut
from threadweaver.trajectory.tags import TAGS

_LINE = re.compile(r"[^\n]*\n|[^\n]+")
_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])")
_BLANK = re.compile(r"\n[^\S\n]*\n")


@dataclass(frozen=True)
class Response:
    """A sequential response; `before`, the lines and `after` are all of it.

    Attributes:
        before: what opens the reasoning.
        lines: of the reasoning, each with the white space that follows it.
        after: what closes the reasoning, and the answer.
    """

    before: str
    lines: list[str]
    after: str


def split(response: str) -> Response:
    """The reasoning is what stands between <think> and </think>, or before </think> if the prompt
    opened it; without them, all before the last paragraph that holds a box.

    Raises:
        LeftOut: there is none, it has a single line, or it holds tags of the format.
    """
    if (tag := next((t for t in TAGS if t in response and "think" not in t), None)) is not None:
        raise LeftOut("0-answer", "holds tags of the format already", tag)
    opened = response.find("<think>")
    start = opened + len("<think>") if opened >= 0 else 0
    end = response.rfind("</think>")
    if end < 0 and opened >= 0:
        raise LeftOut("0-answer", "its thinking is never closed")
    if end < 0:
        boxes = [box.start() for box in _BOX.finditer(response)]
        blanks = [blank.end() for blank in _BLANK.finditer(response, 0, boxes[-1] if boxes else 0)]
        end = blanks[-1] if blanks else 0
    reasoning = response[start:end]
    if "<think>" in reasoning or "</think>" in reasoning:
        raise LeftOut("0-answer", "opens or closes its thinking twice")
    # White space in front belongs to no line.
    start += len(reasoning) - len(reasoning.lstrip())
    lines = split_lines(response[start:end])
    if not lines:
        raise LeftOut("0-answer", "has no reasoning before its answer")
    if len(lines) < 2:
        raise LeftOut("0-answer", "its reasoning has a single line")
    return Response(response[:start], lines, response[end:])


def split_lines(text: str) -> list[str]:
    """Lines that are not blank, each with its newline and the blank lines after it."""
    lines: list[str] = []
    for line in _LINE.findall(text):
        if line.strip() or not lines:
            lines.append(line)
        else:
            lines[-1] += line
    return lines


def numbered(lines: list[str]) -> str:
    """As the teacher sees them: "1: ...", one below the other."""
    return "\n".join(f"{n}: {line.strip()}" for n, line in enumerate(lines, 1))
