"""Step 4: for each thread of a block one line that says what is to be done.

<Outlines>
<Outline>1: the case of even n</Outline>
<Outline>2: the case of odd n</Outline>
</Outlines>
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from threadweaver.annotate.failures import Breach
from threadweaver.annotate.reply import check_text, without_fence

# White space at both ends is stripped afterwards: matched beside `.*` it takes cubic time.
_REPLY = re.compile(r"<Outlines>(.*)</Outlines>", re.DOTALL)
_OUTLINE = re.compile(r"<Outline>\s*([0-9]+)\s*:(.*?)</Outline>\s*", re.DOTALL | re.ASCII)
# A single digit is more often the number of a case than a result.
_NUMBER = re.compile(r"[0-9]+(?:[.,][0-9]+)*", re.ASCII)


def read_outlines(reply: str, threads: Sequence[str], before: str) -> list[str]:
    """The outlines of a reply, one a thread.

    Args:
        before: all that stands before the block, the problem included.

    Raises:
        Breach: another form, count or order, a tag, an outline without text or of several lines,
            or one with a number of two digits or more that only its thread comes to.
    """
    whole = _REPLY.fullmatch(without_fence(reply).strip())
    if not whole:
        raise Breach("form", "the reply is not one <Outlines>...</Outlines>")
    text = whole[1].strip()
    found = list(_OUTLINE.finditer(text))
    if "".join(outline[0] for outline in found) != text:
        raise Breach("form", "between <Outlines> and </Outlines> only <Outline>n: text</Outline>")
    if len(found) != len(threads):
        raise Breach("rule", f"there are {len(found)} outlines for {len(threads)} threads")
    known = set(_NUMBER.findall(before))
    outlines = []
    for n, (outline, thread) in enumerate(zip(found, threads, strict=True), 1):
        number, text = outline[1], outline[2].strip()
        if number != str(n):
            raise Breach("rule", f"outline {n} has the number {number[:9]}: count 1, 2, 3, ...")
        check_text(text, f"outline {n}")
        if not text:
            raise Breach("rule", f"outline {n} has no text")
        if "\n" in text:
            raise Breach("rule", f"outline {n} has more than one line")
        results = set(_NUMBER.findall(thread)) - known
        for number in _NUMBER.findall(text):
            if len(number) > 1 and number in results:
                raise Breach(
                    "rule",
                    f"outline {n} names {number}, which comes out in its thread: say what is to "
                    "be done, not what came out",
                )
        outlines.append(text)
    return outlines
