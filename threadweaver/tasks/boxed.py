"""The answer of a response: what its last box after the thinking holds."""

from __future__ import annotations


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
