"""The columns of training data: those of the published implementation, which we write, and verl's.

question       the prompt as text
response       the text after the prompt
qwen_text      the full training text, prompt + response
reward_model   {"ground_truth": the right answer as text, "style": "rule"}
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from threadweaver.data.chat import qwen_prompt, split_chat
from threadweaver.data.files import DataError, kind_of, read_rows


@dataclass(frozen=True)
class Example:
    """One row of training data.

    Attributes:
        prompt: text before the response, without loss.
        response: empty only if the row has none and none was asked for.
        ground_truth: the right answer; None if the row names none.
        source: "file:line", or "file, row n" for parquet; both count from 1.
    """

    prompt: str
    response: str
    ground_truth: str | None
    source: str


def trajectory_row(prompt: str, response: str | None, answer: object) -> dict[str, Any]:
    """A row in the columns that we write; without `response` and `qwen_text` if there is none."""
    row: dict[str, Any] = {"question": prompt}
    if response is not None:
        row |= {"response": response, "qwen_text": prompt + response}
    return row | {"reward_model": {"ground_truth": str(answer), "style": "rule"}}


def load_examples(path: str | Path, *, responses: bool = True) -> list[Example]:
    """A list of all that `read_examples` gives."""
    return list(read_examples(path, responses=responses))


def read_examples(path: str | Path, *, responses: bool = True) -> Iterator[Example]:
    """Every row of a JSON lines or parquet file, in order.

    Where the text comes from, first match:

    - `qwen_text`, holding the assistant header of a chat template (Qwen, Llama 3, DeepSeek): the
      prompt is all up to and including the last such header, the response the rest without the
      token that closes the turn.
    - `qwen_text` and `question`: the prompt ends where the question ends, or at the first `<think>`
      after it if there is one.
    - `response`, and `question` as it stands or else verl's `prompt`, a list of
      {"role", "content"}, written out in Qwen's chat template.

    The answer is `reward_model.ground_truth` (nested, or a column of that name) or `ground_truth`;
    a number is taken as its text.

    Args:
        responses: whether every row must hold one; if not, the response of a row with neither
            `qwen_text` nor `response` is empty.

    Raises:
        DataError: as `read_rows`, or for a row with a missing column, a wrong type or an empty
            text; names file, row and field.
    """
    for source, row in read_rows(path):
        yield _example(row, source, responses)


def _example(row: dict[str, Any], source: str, needs_response: bool) -> Example:
    # A column that only other rows fill reads as None in parquet: None is the same as missing.
    row = {name: value for name, value in row.items() if value is not None}
    if "qwen_text" in row:
        prompt, response, field = *_split(row, source), "qwen_text"
    elif "response" in row:
        prompt, response, field = _prompt(row, source), _text(row, "response", source), "response"
    elif not needs_response:
        return Example(_prompt(row, source), "", _ground_truth(row, source), source)
    else:
        raise _missing("qwen_text' or 'response", row, source)
    if not response.strip():
        raise DataError(
            f"{source}: field '{field}': the response is empty; fill it in or remove the row"
        )
    return Example(prompt, response, _ground_truth(row, source), source)


def _split(row: dict[str, Any], source: str) -> tuple[str, str]:
    """Prompt and response of a `qwen_text`; together the whole text but for the end of a turn."""
    text = _text(row, "qwen_text", source)
    if chat := split_chat(text):
        return chat
    question = _text(row, "question", source)
    start = text.find(question)
    if start < 0:
        raise DataError(
            f"{source}: field 'qwen_text' does not hold the text of 'question' or a known chat "
            f"template, so where the response starts is unknown; let it start with the question"
        )
    start += len(question)
    think = text.find("<think>", start)
    start = max(start, think)
    return text[:start], text[start:]


def _prompt(row: dict[str, Any], source: str) -> str:
    if "question" in row:
        return _text(row, "question", source)
    if "prompt" not in row:
        raise _missing("question' or 'prompt", row, source)
    messages = row["prompt"]
    if not isinstance(messages, list) or not messages:
        raise _wrong_type("prompt", 'a list of {"role", "content"}', messages, source)
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise _wrong_type(f"prompt[{i}]", 'an object {"role", "content"}', message, source)
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise _wrong_type(f"prompt[{i}].{key}", "text", message.get(key), source)
    return qwen_prompt(messages)


def _ground_truth(row: dict[str, Any], source: str) -> str | None:
    field, value = "ground_truth", row.get("ground_truth")
    if "reward_model.ground_truth" in row:
        field, value = "reward_model.ground_truth", row["reward_model.ground_truth"]
    elif "reward_model" in row:
        field, nested = "reward_model.ground_truth", row["reward_model"]
        if not isinstance(nested, dict):
            raise _wrong_type("reward_model", 'an object {"ground_truth": …}', nested, source)
        value = nested.get("ground_truth")
        if value is None:
            raise _missing(field, nested, source)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise _wrong_type(field, "text or a number", value, source)
    return str(value)


def _text(row: dict[str, Any], field: str, source: str) -> str:
    if field not in row:
        raise _missing(field, row, source)
    value = row[field]
    if not isinstance(value, str):
        raise _wrong_type(field, "text", value, source)
    if not value.strip():
        raise DataError(f"{source}: field '{field}' is empty; fill it in or remove the row")
    return value


def _missing(field: str, row: dict[str, Any], source: str) -> DataError:
    found = ", ".join(sorted(row)) or "nothing"
    return DataError(f"{source}: no field '{field}' (found: {found}); add it")


def _wrong_type(field: str, expected: str, value: Any, source: str) -> DataError:
    return DataError(f"{source}: field '{field}' must be {expected}, found {kind_of(value)}")
