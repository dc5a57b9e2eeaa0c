"""The answer of a response: what its last box after the thinking holds."""

from __future__ import annotations

import re


def boxed_answer(response: str) -> str | None:
    """The text in the last `\\boxed{...}` after the last `</think>`, without spaces around it.

    Braces inside a box are matched; a brace after a backslash is a character like any other. None
    for a response that never closes its thinking, boxes nothing or never closes its last box.
    """
    _, closed, answer = response.rpartition("</think>")
    _, boxed, content = answer.rpartition("\\boxed{")
    if not closed or not boxed:
        return None
    depth, escaped = 1, False
    for i, character in enumerate(content):
        if escaped or character == "\\":
            escaped = not escaped
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return content[:i].strip()
    return None


def boxes_number(response: str, number: str) -> bool:
    """Whether the box of a response holds decimal digits alone that make the whole number `number`;
    leading zeros and surrounding spaces do not matter."""
    answer = boxed_answer(response)
    if answer is None or not re.fullmatch("[0-9]+", answer):
        return False
    # As text: a model may box more digits than Python agrees to read as a number.
    return answer.lstrip("0") == number.strip().lstrip("0")
