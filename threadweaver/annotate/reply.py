"""What replies of several steps have in common."""

from __future__ import annotations

import re

from threadweaver.annotate.failures import Breach

_FENCE = re.compile(r"\A\s*```[a-z]*\n(.*)\n```\s*\Z", re.DOTALL)
TAG = re.compile(r"</?[A-Za-z]\w*>")


def without_fence(reply: str) -> str:
    """What stands between the marks of a code block, if that is all there is."""
    fence = _FENCE.match(reply)
    return fence[1] if fence else reply


def check_text(text: str, what: str) -> None:
    """Raises Breach for a text with a tag of any name, or with half of a surrogate pair."""
    if found := TAG.search(text):
        raise Breach("rule", f"{what} holds {found[0]}: no tag may stand there")
    if re.search(r"[\ud800-\udfff]", text):
        raise Breach("form", f"{what} holds half of a surrogate pair")
