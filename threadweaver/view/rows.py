"""Trajectories out of files: data, responses of an evaluation, rollouts of self-training.

What a file says of a row (its grade, violations and lengths) is taken as it stands; what it does
not say is left out. A response may be empty or hold anything: it is shown, not trained on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from threadweaver.data import DataError, read_rows
from threadweaver.data.columns import ANSWERS, PROMPTS, example_of
from threadweaver.data.files import data_files
from threadweaver.trajectory import Prompt, Rendered


@dataclass(frozen=True)
class Row:
    """A trajectory, and what its file says of it; None for what it does not say.

    Attributes:
        prompt: text or messages.
        answer: the right one.
        violations: of the format, as the file lists them.
        tokens: all, and those of the longest path.
        mode: of decoding, "parallel" or "sequential".
        source: "file:line", or what else names the row in its file.
    """

    prompt: Prompt
    response: str
    answer: str | None
    correct: bool | None
    violations: list[str] | None
    tokens: tuple[int, int] | None
    mode: str | None
    source: str


def read_trajectories(path: str) -> Iterator[Row]:
    """Every row of a data file, of a file of `evaluate --responses`, of a chunk of self-training's
    rollouts, or of the responses that a pipeline keeps; of a folder or pattern of such files.

    Raises:
        DataError: as `threadweaver.data.read_rows`, or for a row that holds no trajectory.
    """
    for file in data_files(path):
        for source, row in _raw_rows(file):
            yield _row(row, source)


def _raw_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    rollouts = _rollouts(file) if file.suffix == ".json" else None
    if rollouts is None:
        yield from read_rows(file)
        return
    if not rollouts:
        raise DataError(f"{file}: holds no rollouts")
    for number, row in enumerate(rollouts, 1):
        source = f"{file}, rollout {number}"
        if not isinstance(row, dict):
            raise DataError(f"{source}: is no object: the file is damaged")
        yield source, row


def _rollouts(file: Path) -> list[Any] | None:
    """Those of a file that is one JSON value; None for a file with an object a line."""
    try:
        value = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return None  # read_rows says what is wrong, if anything is
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    found = value.get("rollouts") if isinstance(value, dict) else value
    return found if isinstance(found, list) else None


def _row(row: dict[str, Any], source: str) -> Row:
    row = {name: value for name, value in row.items() if value is not None}
    prompt = next((row[name] for name in PROMPTS if name in row), None)
    response, text = row.get("response"), row.get("qwen_text")
    if prompt is None and isinstance(text, str) and isinstance(response, str):
        before = text.removesuffix(response)
        if before.strip() and before + response == text:
            prompt = Rendered(before)
    # Where any other `qwen_text` parts into prompt and response is said in one place.
    if (
        isinstance(response, str)
        and _is_prompt(prompt)
        and (text is None or (isinstance(prompt, str) and text == prompt + response))
    ):
        if row.get("rendered") is True and isinstance(prompt, str):
            prompt = Rendered(prompt)
        truth = row.get("reward_model")
        answer = truth.get("ground_truth") if isinstance(truth, dict) else None
        answer = next((row[name] for name in ANSWERS if name in row), answer)
    else:
        example = example_of(row, source)
        prompt, response, answer = example.prompt, example.response, example.ground_truth
    if isinstance(answer, list | tuple):
        answer = " or ".join(map(str, answer))
    listed = row.get("violations")
    lengths = [row.get(name) for name in ("total_tokens", "longest_path_tokens")]
    total, longest = (int(n) if _is_count(n) else None for n in lengths)
    correct, mode = row.get("correct"), row.get("mode")
    return Row(
        prompt,
        response,
        None if answer is None else str(answer),
        bool(correct) if correct in (True, False) else None,
        [str(line) for line in listed] if isinstance(listed, list) else None,
        None if total is None or longest is None else (total, longest),
        mode if isinstance(mode, str) else None,
        source,
    )


def _is_prompt(value: Any) -> TypeGuard[Prompt]:
    if isinstance(value, str):
        return True
    return isinstance(value, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("content"), str) for turn in value
    )


def _is_count(value: Any) -> TypeGuard[float]:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 <= value < 2**53  # neither NaN nor infinite
