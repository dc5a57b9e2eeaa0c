"""The answer of a response, in its last box after the thinking, and that of a ground truth."""

from __future__ import annotations

import re

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_LAST_LINE = re.compile(r"^####[^\S\n]*(\S.*)\s*\Z", re.MULTILINE)
_BARE = re.compile(r"\\[a-zA-Z]+|[^\s{}$]")  # what a command takes that no brace follows


def boxed_answer(response: str) -> str | None:
    """The text in the last `\\boxed{...}` or `\\fbox{...}`, without spaces around it.

    After the last `</think>` where there is one, else anywhere. Braces inside a box are matched; a
    brace after a backslash is a character like any other. `\\boxed 7` boxes a character or command.
    None for a response that opens its thinking and never closes it, boxes nothing or never closes
    its last box. Takes time in proportion to the response's length.
    """
    _, closed, answer = response.rpartition("</think>")
    if not closed and "<think>" in answer:
        return None
    start = None
    for box in _BOX.finditer(answer):
        start = box.end()
    if start is None:
        return None
    if answer[start : start + 1] != "{":
        bare = _BARE.match(answer, start)
        return bare[0] if bare else None
    depth, escaped = 0, False
    for i in range(start, len(answer)):
        character = answer[i]
        if escaped or character == "\\":
            escaped = not escaped
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return answer[start + 1 : i].strip()
    return None


def stated_answer(truth: str) -> str:
    """What a ground truth says is the answer: its last box, else what follows `####` on its last
    line, as in GSM8K, else all of it."""
    if box := boxed_answer(truth):
        return box
    last = _LAST_LINE.search(truth)
    return last[1].strip() if last else truth


def boxes_number(response: str, number: str) -> bool:
    """Whether the box of a response holds decimal digits alone that make the whole number `number`;
    leading zeros and surrounding spaces do not matter."""
    answer = boxed_answer(response)
    if answer is None or not re.fullmatch("[0-9]+", answer):
        return False
    # As text: a model may box more digits than Python agrees to read as a number.
    return answer.lstrip("0") == number.strip().lstrip("0")
