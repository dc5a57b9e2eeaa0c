"""The page of trajectories: an index of all rows, and the rows in chunks that the page reads when
one of them is looked at.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from threadweaver.data import DataError
from threadweaver.trajectory import Codec, Prompt, find_violations, opened_thinking
from threadweaver.view.lanes import Lanes, count_words, lanes, tokens_of
from threadweaver.view.page import as_json, build_page
from threadweaver.view.rows import Row

CHUNK = 64
MOST_CHARACTERS = 160  # of a prompt, in the list

_THINK = re.compile("</?think>")

Json = dict[str, Any]


def trajectory_page(
    rows: Iterable[Row],
    title: str,
    codec: Codec | None = None,
    *,
    max_depth: int = 1,
    on_row: Callable[[int], None] = lambda done: None,
) -> str:
    """The text of the page.

    Args:
        codec: for lengths in tokens; without one they are in words.
        max_depth: how deep blocks may nest, in rows whose file lists no violations.
        on_row: gets the number of rows done, after each.

    Raises:
        DataError: a response that the tokenizer cannot take; names the row.
    """
    measure = count_words if codec is None else tokens_of(codec)
    index: list[list[Any]] = []
    chunks: list[str] = []
    part: list[Json] = []
    for row in rows:
        breaches = _breaches(row, max_depth)
        try:
            found = lanes(row.response, [at for _, at in breaches], measure)
        except ValueError as error:
            raise DataError(f"{row.source}: {error}") from error
        index.append(_entry(row, found, len(breaches)))
        part.append(_detail(row, found, [line for line, _ in breaches]))
        if len(part) == CHUNK:
            chunks.append(as_json(part))
            part = []
        on_row(len(index))
    if part:
        chunks.append(as_json(part))
    about = {
        "file": Path(title).name,
        "path": title,
        "unit": "words" if codec is None else "tokens",
        "chunk": CHUNK,
        "rows": len(index),
    }
    # Columns are parsed faster, and take less room, than a list of rows.
    columns = dict(zip(_COLUMNS, map(list, zip(*index, strict=True)), strict=False))
    data = {"about": as_json(about), "index": as_json(columns)}
    return build_page(
        "trajectory",
        f"{about['file']}: trajectories",
        data | {f"chunk-{i}": chunk for i, chunk in enumerate(chunks)},
    )


# right: 1, 0, or -1 where the file does not say; total and longest in the unit of the page.
_COLUMNS = ("ask", "right", "breaches", "threads", "total", "longest", "repeated", "grams")


def _entry(row: Row, found: Lanes, breaches: int) -> list[Any]:
    ask = " ".join(prompt_text(row.prompt).split())
    return [
        ask if len(ask) <= MOST_CHARACTERS else ask[:MOST_CHARACTERS] + "…",
        -1 if row.correct is None else int(row.correct),
        breaches,
        found.threads,
        found.total,
        found.longest,
        found.repeated,
        found.grams,
    ]


def _detail(row: Row, found: Lanes, breaches: list[str]) -> Json:
    detail = {
        "ask": prompt_text(row.prompt),
        "answer": row.answer,
        "line": found.line,
        "breaches": breaches,
        "blocks": found.blocks,
        "recorded": row.tokens,
        "mode": row.mode,
        "source": row.source,
    }
    return {name: value for name, value in detail.items() if value is not None}


def _breaches(row: Row, max_depth: int) -> list[tuple[str, int]]:
    """Violations and the characters of the response that they are at. Those that the file lists
    stand; where they are is found again, at worst by their line."""
    opened = opened_thinking(prompt_text(row.prompt))
    first = _THINK.search(row.response)
    if row.violations is None and first and first[0] == "</think>":
        opened = "<think>"  # by a chat template, of which the file does not tell
    text = opened + row.response
    if row.violations is None:
        found = find_violations(text, max_depth=max_depth)
    elif not row.violations:
        return []
    else:
        known = dict(find_violations(text, max_depth=max_depth))
        found = [(line, known.get(line, _line_start(text, line))) for line in row.violations]
    return [(line, max(0, at - len(opened))) for line, at in found]


def _line_start(text: str, violation: str) -> int:
    """Where the line begins that "line n: ..." names; 0 if it names none that there is."""
    word, _, rest = violation.partition(" ")
    number = rest.partition(":")[0]
    if word != "line" or not number.isdecimal() or len(number) > 9:
        return 0
    before = text.split("\n", int(number) - 1)[:-1]
    is_there = len(before) == int(number) - 1
    return sum(len(line) + 1 for line in before) if is_there else 0


def prompt_text(prompt: Prompt) -> str:
    """A prompt to read: messages one below the other, each after its role."""
    if isinstance(prompt, str):
        return prompt
    turns = ((turn.get("role"), turn["content"]) for turn in prompt)
    return "\n\n".join(f"{role}: {content}" if role else content for role, content in turns)
