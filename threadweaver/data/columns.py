"""The columns of data files: those of the published implementation, which we write, verl's, and
other common ones (docs/semantics.md, "Prompts and answers").

question       the prompt as text
response       the text after the prompt
qwen_text      the full training text, prompt + response
reward_model   {"ground_truth": the right answer as text, "style": "rule"}
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from threadweaver.data.files import DataError, kind_of, read_rows
from threadweaver.trajectory import Codec, Prompt, Rendered
from threadweaver.trajectory.prompt import CONTROL

# In each row the first of these that is there and not null.
PROMPTS = ("question", "prompt", "problem", "query", "input")
ANSWERS = ("ground_truth", "expected_answer", "final_answer", "answer", "solution")
# A chat template may leave out a turn of a role that it does not know.
ROLES = ("system", "developer", "user", "assistant", "tool")

# What may close a turn, as any vocabulary writes it; to compare texts without it.
_ANY_END = re.compile(r"(?:<[^<>\s]+>\s*)+\Z")
_CONTROL_END = re.compile(rf"(?:{CONTROL.pattern}\s*)+\Z")


class Unsplit(DataError):  # noqa: N818 (named for what was found)
    """A `qwen_text` of which nothing says where the response starts."""


@dataclass(frozen=True)
class Example:
    """One row of training data.

    Attributes:
        prompt: what comes before the response, without loss.
        response: empty only if the row has none, none that can be told from its prompt or none
            that can be trained on, and none was asked for.
        ground_truth: the right answer, or several of which any is right; None if the row names
            none.
        source: "file:line", or "file, row n" for parquet; both count from 1.
        columns: where prompt, response and answer were taken from; None for what is not there.
    """

    prompt: Prompt
    response: str
    ground_truth: str | tuple[str, ...] | None
    source: str
    columns: tuple[str | None, str | None, str | None] = field(
        default=(None, None, None), compare=False, repr=False
    )


def trajectory_row(prompt: Prompt, response: str | None, answer: object) -> dict[str, Any]:
    """A row in the columns that we write; without `response` and `qwen_text` if there is none."""
    row: dict[str, Any]
    if isinstance(prompt, Rendered):
        row = {"qwen_text": prompt + (response or "")}
    elif isinstance(prompt, str):
        row = {"question": prompt}
        if response is not None:
            row["qwen_text"] = prompt + response
    else:
        row = {"prompt": prompt}
    if response is not None:
        row["response"] = response
    truth = [str(one) for one in answer] if isinstance(answer, list | tuple) else str(answer)
    return row | {"reward_model": {"ground_truth": truth, "style": "rule"}}


def load_examples(
    path: str | Path, *, responses: bool = True, codec: Codec | None = None
) -> list[Example]:
    """A list of all that `read_examples` gives."""
    return list(read_examples(path, responses=responses, codec=codec))


def read_examples(
    path: str | Path, *, responses: bool = True, codec: Codec | None = None
) -> Iterator[Example]:
    """Every row of a data file, a folder of them or a pattern of paths, in order.

    The prompt is the first of the columns `question`, `prompt`, `problem`, `query` and `input`:
    text, or a list of messages {"role", "content"}. The response is `response`. A `qwen_text`
    holds both, and its part before the response is the prompt, already rendered, unless it is
    nothing but the question; the first of these says where the response starts:

    - `response`, with which it must end;
    - the codec: after the question as its chat template renders it, or after the header of the
      assistant's turn;
    - the end of the question's text, which must occur once, or the first `<think>` after it;
    - in a row without a question, the only `<think>`.

    The answer is the first of `reward_model.ground_truth` (nested, or a column of that name),
    `ground_truth`, `expected_answer`, `final_answer`, `answer` and `solution`: text, a number,
    taken as its text, or a list of these, of which any is right.

    Args:
        responses: whether every row must hold one; if not, a question is the prompt even where a
            `qwen_text` has it rendered, and the response of a row is empty if it has neither
            `qwen_text` nor `response`, a `qwen_text` that nothing splits, or a response that is
            empty or holds a control token before its end.
        codec: of the model that is to read the prompts.

    Raises:
        DataError: as `read_rows`, or for a row with a missing column, a wrong type, an empty text,
            or texts that contradict each other; names file, row and field.
    """
    for source, row in read_rows(path):
        yield example_of(row, source, responses=responses, codec=codec)


def columns_note(path: str, examples: Iterable[Example]) -> str:
    """One line: how many rows, and which columns their parts were taken from."""
    columns = Counter(example.columns for example in examples)
    parts = []
    for taken, count in columns.most_common():
        names = zip(("prompt", "response", "answer"), taken, strict=True)
        named = ", ".join(f"{part} from {column}" for part, column in names if column)
        parts.append(f"{count:,} rows: {named}")
    return f"{path}: {'; '.join(parts)}"


def example_of(
    row: dict[str, Any], source: str, *, responses: bool = True, codec: Codec | None = None
) -> Example:
    """The example that a row holds; arguments and errors as for `read_examples`."""
    # A column that only other rows fill reads as None in parquet: None is the same as missing.
    row = {name: value for name, value in row.items() if value is not None}
    asked = _asked_by(row)
    question = _prompt(row, asked, source) if asked else None
    answered, truth = _ground_truth(row, source)
    empty = row.get("response")
    if not responses and isinstance(empty, str) and not empty.strip():
        # Of a model that ended at once.
        if question is not None:
            return Example(question, "", truth, source, (asked, None, answered))
        if "qwen_text" in row:
            prompt = Rendered(_text(row, "qwen_text", source).removesuffix(empty))
            return Example(prompt, "", truth, source, ("qwen_text", None, answered))
    if "qwen_text" in row:
        try:
            prompt, response = _split(row, question, source, codec)
        except Unsplit:
            if responses or question is None:
                raise
            return Example(question, "", truth, source, (asked, None, answered))
        prompt_column = response_column = "qwen_text"
        if question is not None and (prompt == question or not responses):
            prompt, prompt_column = question, asked
    else:
        if not responses or "response" in row:
            if question is None:
                raise _missing("question' or 'prompt", row, source)
            prompt, prompt_column = question, asked
        else:
            raise _missing("qwen_text' or 'response", row, source)
        if "response" not in row:
            return Example(prompt, "", truth, source, (prompt_column, None, answered))
        response, response_column = _text(row, "response", source), "response"
    body = _CONTROL_END.sub("", response)
    if not responses and (not body.strip() or CONTROL.search(body)):
        return Example(prompt, "", truth, source, (prompt_column, None, answered))
    if not body.strip():
        raise DataError(
            f"{source}: field '{response_column}': the response is empty; fill it in or remove "
            "the row"
        )
    if control := CONTROL.search(body):
        raise DataError(_holds_control(response_column, control[0], source))
    return Example(prompt, response, truth, source, (prompt_column, response_column, answered))


def _asked_by(row: dict[str, Any]) -> str | None:
    return next((name for name in PROMPTS if name in row), None)


def _split(
    row: dict[str, Any], question: Prompt | None, source: str, codec: Codec | None
) -> tuple[Prompt, str]:
    """Prompt and response of a `qwen_text`, without the control tokens that close its turn."""
    text = _text(row, "qwen_text", source)
    start = _start_of_response(text, row, question, source, codec)
    before, response = text[:start], _CONTROL_END.sub("", text[start:])
    if "response" not in row and (control := CONTROL.search(response)):
        # Of several turns, or of the prompt's end.
        raise Unsplit(_holds_control("qwen_text", control[0], source))
    if not before.strip():
        raise DataError(
            f"{source}: field 'qwen_text' holds no prompt before the response; put it in front"
        )
    if question is not None and before in _asked(question, codec, source):
        return question, response
    return Rendered(before), response


def _start_of_response(
    text: str, row: dict[str, Any], question: Prompt | None, source: str, codec: Codec | None
) -> int:
    if "response" in row:
        whole, response = text.rstrip(), _text(row, "response", source).rstrip()
        if not whole.endswith(response):
            # But for what may close a turn, in either.
            whole, response = (_ANY_END.sub("", t).rstrip() for t in (whole, response))
        if not response or not whole.endswith(response):
            raise DataError(
                f"{source}: field 'qwen_text' does not end with the text of 'response': remove "
                "the one that is not to be trained on"
            )
        return len(whole) - len(response)
    if question is not None and codec is not None:
        for rendered in _rendered(codec, question, source):
            if text.startswith(rendered):
                return len(rendered)
    header = codec.prompts.header if codec is not None else ""
    if question is None:
        if header and header in text:
            return text.rindex(header) + len(header)
        if text.count("<think>") == 1:
            return text.index("<think>")
        raise Unsplit(str(_missing("question", row, source)))
    asked = question if isinstance(question, str) else question[-1]["content"]
    found = text.count(asked)
    if found != 1:
        held = "does not hold" if not found else f"holds {found} times"
        raise Unsplit(
            f"{source}: field 'qwen_text' {held} the text of '{_asked_by(row)}', so where the "
            "response starts is unknown; give the response in a field 'response' too"
        )
    end = text.index(asked) + len(asked)
    if header and (headers := text.count(header, end)):
        if headers > 1:
            raise Unsplit(
                f"{source}: field 'qwen_text' holds {headers} turns of the assistant after the "
                "question; give the last in a field 'response' too"
            )
        return text.index(header, end) + len(header)
    return max(end, text.find("<think>", end))


def _holds_control(column: str, control: str, source: str) -> str:
    return (
        f"{source}: field '{column}': the response holds {control}, a control token: give the "
        "last turn alone in a field 'response'"
    )


def _rendered(codec: Codec, prompt: Prompt, source: str) -> tuple[str, str]:
    """The text of a row's prompt, and without what the tokenizer begins every text with. Raises
    DataError if the chat template refuses it."""
    try:
        text = codec.prompts.text(prompt)
    except ValueError as error:
        raise DataError(f"{source}: {error}") from error
    return text, text.removeprefix(codec.prompts.start)


def _asked(question: Prompt, codec: Codec | None, source: str) -> tuple[str, ...]:
    if codec is not None and not isinstance(question, str):
        return _rendered(codec, question, source)
    return (question,) if isinstance(question, str) else ()


def _prompt(row: dict[str, Any], column: str, source: str) -> Prompt:
    messages = row[column]
    if isinstance(messages, str):
        return _text(row, column, source)
    if not isinstance(messages, list) or not messages:
        raise _wrong_type(column, 'text or a list of {"role", "content"}', messages, source)
    for i, message in enumerate(messages):
        name = f"{column}[{i}]"
        if not isinstance(message, dict):
            raise _wrong_type(name, 'an object {"role", "content"}', message, source)
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise _wrong_type(f"{name}.{key}", "text", message.get(key), source)
            _check_text(f"{name}.{key}", message[key], source)
        if message["role"] not in ROLES:
            raise DataError(
                f"{source}: field '{name}.role' is {message['role'][:40]!r}; "
                f"use one of {', '.join(ROLES)}"
            )
    if messages[-1]["role"] == "assistant":
        raise DataError(
            f"{source}: field '{column}' ends with a turn of the assistant, so that nothing is "
            "left to answer; give that turn in a field 'response'"
        )
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _ground_truth(
    row: dict[str, Any], source: str
) -> tuple[str | None, str | tuple[str, ...] | None]:
    """The column of the answer, and the answer; None, None if there is none."""
    column = next((name for name in ANSWERS if name in row), None)
    value = row[column] if column else None
    if "reward_model.ground_truth" in row:
        column, value = "reward_model.ground_truth", row["reward_model.ground_truth"]
    elif "reward_model" in row:
        column, nested = "reward_model.ground_truth", row["reward_model"]
        if not isinstance(nested, dict):
            raise _wrong_type("reward_model", 'an object {"ground_truth": …}', nested, source)
        value = nested.get("ground_truth")
        if value is None:
            raise _missing(column, nested, source)
    if column is None:
        return None, None
    if not isinstance(value, list):
        return column, _answer(column, value, "text, a number or a list of these", source)
    if not value:
        raise DataError(f"{source}: field '{column}' is an empty list; give the right answer")
    several = (
        _answer(f"{column}[{i}]", one, "text or a number", source) for i, one in enumerate(value)
    )
    first, *others = dict.fromkeys(several)
    return column, (first, *others) if others else first


def _answer(field: str, value: Any, expected: str, source: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        raise _wrong_type(field, expected, value, source)
    if isinstance(value, str):
        _check_text(field, value, source)
    elif not isinstance(value, int) and not math.isfinite(value):
        raise DataError(
            f"{source}: field '{field}' is {value}, which no answer can equal; correct it"
        )
    return str(value)


def _text(row: dict[str, Any], field: str, source: str) -> str:
    value = row[field]
    if not isinstance(value, str):
        raise _wrong_type(field, "text", value, source)
    if not value.strip():
        raise DataError(f"{source}: field '{field}' is empty; fill it in or remove the row")
    _check_text(field, value, source)
    return value


def _check_text(field: str, value: str, source: str) -> None:
    if half := re.search(r"[\ud800-\udfff]", value):
        raise DataError(
            f"{source}: field '{field}' holds half of a surrogate pair "
            f"(U+{ord(half[0]):04X}, character {half.start() + 1}), which is no text; correct it"
        )


def _missing(field: str, row: dict[str, Any], source: str) -> DataError:
    found = ", ".join(sorted(row)) or "nothing"
    return DataError(f"{source}: no field '{field}' (found: {found}); add it")


def _wrong_type(field: str, expected: str, value: Any, source: str) -> DataError:
    return DataError(f"{source}: field '{field}' must be {expected}, found {kind_of(value)}")
