"""Training data on disk: rows written and read in the columns of the published implementation.

A file is JSON lines (`.jsonl`, or `.json` with one object a line) or parquet. Columns we write:

    question       the prompt as text
    response       the text after the prompt
    qwen_text      the full training text, prompt + response
    reward_model   {"ground_truth": the right answer as text, "style": "rule"}

`read_examples` also reads what was made for that implementation and for verl; see there. No row is
ever dropped: one that cannot be used stops the load with a `DataError` naming file, row and field.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# (header before the assistant's turn, text that closes it) of the chat templates that `qwen_text`
# is found in: Qwen, Llama 3, DeepSeek.
CHAT_TURNS = (
    ("<|im_start|>assistant\n", "<|im_end|>"),
    ("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
    ("<｜Assistant｜>", "<｜end▁of▁sentence｜>"),  # noqa: RUF001 (that template's own characters)
)


class DataError(ValueError):
    """Data that cannot be used; the message says where, what is wrong and what to do."""


@dataclass(frozen=True)
class Example:
    """One row: train on `prompt + response`, with loss on the response only."""

    prompt: str
    response: str  # empty only where none was asked for
    ground_truth: str | None  # None: the row names no answer
    source: str  # "file:line", or "file, row n" for parquet; both count from 1


def save_rows(rows: Sequence[dict], path: str | Path) -> None:
    """Write rows to `path`, as JSON lines (`.jsonl`) or parquet (`.parquet`, by `datasets`).

    The file appears whole or not at all, and its folder is made if need be. Both kinds are read by
    `load_examples` and by `datasets.load_dataset`. Raises DataError for any other extension.
    """
    path = Path(path)
    if path.suffix not in (".jsonl", ".parquet"):
        raise DataError(f"{path}: cannot write '{path.suffix}'; name it .jsonl or .parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.suffix == ".jsonl":
            with partial.open("w", encoding="utf-8", newline="\n") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        else:
            try:
                from datasets import Dataset
            except ImportError as error:
                raise DataError(
                    f"{path}: writing parquet needs the package 'datasets'; "
                    f"install it or write .jsonl"
                ) from error
            # Of all rows: by itself it takes the columns of the first.
            columns = dict.fromkeys(name for row in rows for name in row)
            table = {name: [row.get(name) for row in rows] for name in columns}
            Dataset.from_dict(table).to_parquet(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_examples(path: str | Path, *, responses: bool = True) -> list[Example]:
    """All that `read_examples` gives."""
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
        DataError: a file that is missing, empty, unreadable or of unknown kind, or a row with a
            missing column, a wrong type or an empty text.
    """
    path = Path(path)
    if path.is_dir():
        raise DataError(f"{path}: is a folder; name one .jsonl or .parquet file in it")
    if not path.exists():
        raise DataError(f"{path}: no such file; check the path")
    if path.suffix in (".jsonl", ".json"):
        rows = _json_rows(path)
    elif path.suffix == ".parquet":
        rows = _parquet_rows(path)
    else:
        raise DataError(
            f"{path}: unknown extension '{path.suffix}'; use .jsonl (or .json, one object a line) "
            f"or .parquet"
        )
    empty = True
    for source, row in rows:
        empty = False
        yield _example(row, source, responses)
    if empty:
        raise DataError(f"{path}: holds no rows; write at least one")


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    # Bytes, so that only a newline ends a line: text may hold other separators (U+2028, form feed).
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            source = f"{path}:{number}"
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{source}: not UTF-8 (byte {error.start + 1} of the line); re-encode the file"
                ) from error
            except json.JSONDecodeError as error:
                if not line.strip():
                    raise DataError(f"{source}: empty line; remove it") from error
                raise DataError(
                    f"{source}: not JSON ({error.msg}, column {error.colno}); "
                    f"write one JSON object a line"
                ) from error
            if not isinstance(row, dict):
                raise DataError(
                    f"{source}: found {_kind(row)} where a row should be; "
                    f"write one JSON object a line"
                )
            yield source, row


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"{path}: reading parquet needs the package 'pyarrow' (it comes with 'datasets'); "
            f"install it or convert the file to .jsonl"
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: not a readable parquet file ({reason}); write it anew") from error


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
    """Prompt and response of a `qwen_text`: the whole text, but for the end of a closed turn."""
    text = _text(row, "qwen_text", source)
    for header, end in CHAT_TURNS:
        before, found, response = text.rpartition(header)
        if found:
            closed = response.rstrip()
            return before + header, closed.removesuffix(end) if closed.endswith(end) else response
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
    turns = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise _wrong_type(f"prompt[{i}]", 'an object {"role", "content"}', message, source)
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise _wrong_type(f"prompt[{i}].{key}", "text", message.get(key), source)
        turns.append(f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n")
    return "".join(turns) + CHAT_TURNS[0][0]


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
    return DataError(f"{source}: field '{field}' must be {expected}, found {_kind(value)}")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", type(None): "null", bool: "a boolean"}
    return names.get(type(value), f"a number ({value})")
