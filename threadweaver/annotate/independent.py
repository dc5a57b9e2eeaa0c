"""Step 3: replacements that take out of a thread what refers to the threads before it.

[{"src": "As in case 1, we", "dest": "We"}]
"""

from __future__ import annotations

import json

from threadweaver.annotate.failures import Breach
from threadweaver.annotate.reply import check_text, without_fence

LEAST_SHARE = 0.5  # of a thread that must be left


def read_independent(reply: str, thread: str) -> str:
    """The thread after the replacements of a reply, each of the first place where its `src` stands
    in the text as it then is.

    Raises:
        Breach: no JSON list of them, a `src` that does not occur, a tag, or too little left.
    """
    text = thread
    for n, (src, dest) in enumerate(_replacements(reply), 1):
        if not src or src not in text:
            raise Breach("rule", f"replacement {n}: its src does not occur in the thread: {src!r}")
        check_text(dest, f"replacement {n}: its dest")
        text = text.replace(src, dest, 1)
    if len(text.strip()) < LEAST_SHARE * len(thread.strip()):
        raise Breach("rule", "less than half of the thread is left: replace fewer words")
    return text


def _replacements(reply: str) -> list[tuple[str, str]]:
    try:
        found = json.loads(without_fence(reply))
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", None) or "nested too deeply, or a number too long"
        raise Breach("form", f"the reply is no JSON ({reason})") from error
    if not isinstance(found, list):
        raise Breach("form", 'the reply is no JSON list of {"src": ..., "dest": ...}')
    pairs = []
    for n, item in enumerate(found, 1):
        pair = (item.get("src"), item.get("dest")) if isinstance(item, dict) else (None, None)
        src, dest = pair
        if not isinstance(src, str) or not isinstance(dest, str):
            raise Breach("form", f'replacement {n} is not {{"src": text, "dest": text}}')
        pairs.append((src, dest))
    return pairs
