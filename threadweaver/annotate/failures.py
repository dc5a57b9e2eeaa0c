"""Why something does not go on."""

from __future__ import annotations

from typing import Literal

Step = Literal["0-answer", "1-map", "2-cut", "3-independent", "4-outline", "5-keep"]

# cut off: it ended by length; form: it cannot be read; rule: it can, and breaks a rule.
Kind = Literal["refused", "cut off", "form", "rule"]


class Breach(ValueError):  # noqa: N818 (named for what was found)
    """A reply that cannot be used; the message is for the teacher."""

    def __init__(self, kind: Kind, message: str):
        super().__init__(message)
        self.kind: Kind = kind


class LeftOut(ValueError):  # noqa: N818 (named for what was found)
    """A trajectory that is not kept.

    Attributes:
        step: that it did not pass.
        reason: a few words, the same for all that are alike; what is counted.
        detail: what else is known.
    """

    def __init__(self, step: Step, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.step: Step = step
        self.reason, self.detail = reason, detail


class NoReply(Exception):  # noqa: N818 (named for what was found)
    """The teacher gave no reply, however often it was asked: asking again may help."""


class Refused(Exception):  # noqa: N818 (named for what was found)
    """The teacher does not take this request: one too long, say. Others may do."""
