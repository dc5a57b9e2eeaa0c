"""Benchmarks of mathematics by name: AIME 2024 and 2025, AMC 2023, MATH-500, Minerva Math and
OlympiadBench (docs/semantics.md, "Benchmarks").

No problem of them is in this package: a file, or a data set on the hub, is the user's to name.

load_task("aime24", path="HuggingFaceH4/aime_2024")
load_task("olympiadbench", path="OE_TO_maths_en_COMP.parquet")
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from threadweaver.data import DataError, Example, columns_note, example_of, is_data_path, read_rows
from threadweaver.grading.judge import Judge
from threadweaver.grading.tolerance import build_tolerant_grader
from threadweaver.tasks.boxed import stated_answer
from threadweaver.tasks.data_file import (
    answers_of,
    check_math_verify,
    problem_of,
    submit_mathematics,
)
from threadweaver.tasks.task import Problem, Split, check_settings, drawn


@dataclass(frozen=True)
class Layout:
    """What is known of a benchmark.

    Attributes:
        samples: responses to each problem, by default.
        sizes: how many problems its public copies hold.
        hub: one of these copies.
        prompts, answers: columns, of which the first that a row has is taken; without capitals.
        largest: the largest answer, where all are whole numbers from 0 on.
    """

    samples: int
    sizes: tuple[int, ...]
    hub: str
    prompts: tuple[str, ...] = ("problem", "question", "prompt")
    answers: tuple[str, ...] = ("answer", "solution")
    largest: int | None = None


BENCHMARKS = {
    # `solution` holds the answer in its box, alone (math-ai) or at its end.
    "aime24": Layout(32, (30,), "HuggingFaceH4/aime_2024", largest=999),
    "aime25": Layout(32, (30, 15), "math-ai/aime25", largest=999),
    "amc23": Layout(32, (40, 83), "math-ai/amc23"),
    "math500": Layout(4, (500,), "HuggingFaceH4/MATH-500"),
    "minerva": Layout(4, (272,), "math-ai/minervamath"),
    "olympiadbench": Layout(
        4,
        (674, 675, 581),
        "math-ai/olympiadbench",
        prompts=("question", "problem", "prompt"),
        answers=("final_answer", "answer"),
    ),
}


class Benchmark:
    """A benchmark, all of which is for evaluation.

    Answers are graded as those of data files are (threadweaver.grading.mathematics); where a row
    has a column `error`, as in OlympiadBench, numbers may differ by as much.

    Args:
        name: one of BENCHMARKS.
        path: its file (JSON lines or parquet), a folder or a pattern of files, or the name that
            `datasets` knows it by.
        split: of a data set of `datasets`; default: `test` if it has one, or else the only one.
        config: of a data set of `datasets`.
        seconds: most CPU time to grade one answer; one that takes longer is wrong.

    Raises:
        DataError: a row that cannot be used; names file, row and field.
        ValueError: no data, or a setting out of range.

    Attributes:
        samples: responses to each problem, by default.
        notes: lines to show: what was taken from which columns, and if there are more or fewer
            problems than usual.
    """

    def __init__(
        self,
        name: str,
        path: str | None = None,
        split: str | None = None,
        config: str | None = None,
        seconds: float = 2.0,
    ):
        layout = BENCHMARKS[name]
        check_settings(0, seconds)
        if path is None:
            raise ValueError(
                f"{name}: give its path, since no benchmark is shipped: --task_options "
                f"'{{path: {layout.hub}}}', or that of a file"
            )
        check_math_verify(name)
        self._name, self.samples = name, layout.samples
        examples: list[Example] = []
        self._problems: list[Problem] = []
        for source, row in _rows(path, split, config):
            example, tolerances = _example(row, source, layout)
            examples.append(example)
            self._problems.append(replace(problem_of(example), data=tolerances))
            if layout.largest is not None:
                _check_whole(name, self._problems[-1], layout.largest)
        self.notes = [columns_note(path, examples)]
        if len(examples) not in layout.sizes:
            self.notes.append(
                f"{name}: {len(examples):,} problems, and its public copies have "
                f"{' or '.join(map(str, layout.sizes))}"
            )
        self._judge = Judge(build_tolerant_grader, seconds=seconds)

    @property
    def ungraded(self) -> int:
        return self._judge.ungraded

    def problems(self, split: Split, n: int | None, seed: int = 0) -> list[Problem]:
        """See `Task`; all of them, for None, are in the order of the file."""
        if split == "train":
            raise ValueError(f"{self._name} is a benchmark, which has no problems to train on")
        return drawn(self._problems, n, seed, self._name)

    def is_correct(self, response: str, problem: Problem) -> bool:
        return self.submit(response, problem)()

    def submit(self, response: str, problem: Problem) -> Callable[[], bool]:
        """See `Task`."""
        return submit_mathematics(self._judge, response, problem, problem.data)

    def demonstration(self, problem: Problem, parallel: bool) -> str | None:
        return None


def _rows(path: str, split: str | None, config: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows and where each stands: those of files, or of a data set that `datasets` loads."""
    if is_data_path(path) or Path(path).exists():
        for name, value in (("split", split), ("config", config)):
            if value is not None:
                raise ValueError(f"option '{name}' is for names on the hub, and {path} is a file")
        yield from read_rows(path)
        return
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(
            f"{path}: no such file, and names on the hub need the package 'datasets': pip install "
            "'threadweaver[train]'"
        ) from error
    try:
        splits: Any = load_dataset(path, config)
    except Exception as error:  # of the hub, the network, a damaged or missing data set
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path}: no such file, and no data set that 'datasets' can load: {reason}"
        ) from error
    chosen = split or ("test" if "test" in splits or len(splits) > 1 else next(iter(splits)))
    if chosen not in splits:
        raise ValueError(f"{path}: no split '{chosen}'; option 'split': one of {', '.join(splits)}")
    for number, row in enumerate(splits[chosen], 1):
        yield f"{path}, row {number}", row


def _example(row: dict[str, Any], source: str, layout: Layout) -> tuple[Example, list[float]]:
    """The example of a row, and the errors that its numbers may have, if it says so."""
    row = {name.lower(): value for name, value in row.items() if value is not None}
    images = [name for name in row if name.startswith("image") and row[name]]
    if images:
        raise DataError(
            f"{source}: field '{images[0]}' holds an image, which no text model sees; take the "
            "problems that are text only"
        )
    kept = {name: row[name] for name in ("reward_model",) if name in row}
    for columns in (layout.prompts, layout.answers):
        if found := next((name for name in columns if name in row), None):
            kept[found] = row[found]
    if layout.answers[0] == "final_answer":
        if "final_answer" not in row and "solution" in row and "answer" not in row:
            raise DataError(
                f"{source}: no final_answer, as in proofs, which cannot be graded; take the "
                "open-ended problems"
            )
        several = kept.get("final_answer")
        if row.get("is_multiple_answer") and isinstance(several, list):
            kept["final_answer"] = ", ".join(map(str, several))  # all of them, not any
        context, asked = row.get("context"), kept.get("question")
        if context and isinstance(context, str) and isinstance(asked, str):
            kept["question"] = f"{context}\n{asked}"
    example = example_of(kept or row, source, responses=False)
    return example, _tolerances(row.get("error"), source)


def _tolerances(error: Any, source: str) -> list[float]:
    """The numbers in OlympiadBench's column `error`: "1e-1", or "1e-1,1e-2"."""
    if error in (None, ""):
        return []
    try:
        # One that is left out between commas is none.
        found = [float(part) if part.strip() else 0.0 for part in str(error).split(",")]
        if not all(0 <= value < float("inf") for value in found):
            raise ValueError
    except ValueError:
        raise DataError(
            f"{source}: field 'error' is {str(error)[:40]!r}: it must be a number, or several with "
            "commas"
        ) from None
    return found


def _check_whole(name: str, problem: Problem, largest: int) -> None:
    """Raises DataError for an answer that cannot be one of this benchmark's."""
    for answer in answers_of(problem):
        number = re.fullmatch(r"\s*0*([0-9]{1,9})(?:\.0*)?\s*", stated_answer(answer))
        if not number or int(number[1]) > largest:
            raise DataError(
                f"{problem.source}: the answer is {answer[:40]!r}, and those of {name} are whole "
                f"numbers from 0 to {largest}; is this the right file?"
            )
