"""The form of a reply, part by part: what may come next, given what is there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """The next part of a reply.

    Attributes:
        grammar: in GBNF; none of its texts begins another.
        may_end: whether the reply may end instead.
    """

    grammar: str
    may_end: bool = False


# Of the text so far, which is that of whole parts; None: the reply ends.
Form = Callable[[str], Part | None]


def whole(grammar: str) -> Form:
    """A reply of a single part."""
    return lambda text: None if text else Part(grammar)
