"""Problems from a data file, graded as mathematics by math-verify, or as whole numbers."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable

from threadweaver.data import DataError, Example, load_examples
from threadweaver.grading.judge import Judge
from threadweaver.grading.mathematics import build_math_grader
from threadweaver.tasks.boxed import boxed_answer, boxes_number
from threadweaver.tasks.task import Problem, Split, check_count, check_settings, is_held_out


class DataFile:
    """Prompts and answers of a JSON lines or parquet file; see `threadweaver.data` for its columns.

    A response, where a row has one, is the demonstration. An answer is right if its box holds the
    same text as the row's ground truth or means the same (threadweaver.grading.mathematics):
    `\\frac{1}{2}`, 0.5.

    Args:
        path: of the file.
        held_out: share of the prompts that make up the validation split; which ones depends on
            their text alone. 1: the whole file is for evaluation.
        seconds: most CPU time to grade one answer; one that takes longer is wrong.
        whole_numbers: an answer is right if its box holds decimal digits alone and they equal the
            ground truth as a whole number; needs no math-verify.

    Raises:
        DataError: a row that cannot be used, or one without an answer; names file, row and field.
        ValueError: a setting out of range, or math-verify is not installed.
    """

    def __init__(
        self,
        path: str,
        held_out: float = 0.1,
        seconds: float = 5.0,
        whole_numbers: bool = False,
    ):
        check_settings(held_out, seconds)
        if not whole_numbers and importlib.util.find_spec("math_verify") is None:
            raise ValueError(
                f"{path}: grading its answers needs the package 'math-verify'; "
                "install it, or the extra that holds it: threadweaver[tasks]"
            )
        self._path, self._whole_numbers = path, whole_numbers
        self._splits: dict[Split, list[Problem]] = {"train": [], "validation": []}
        for example in load_examples(path, responses=False):
            held = is_held_out(example.prompt, held_out)
            self._splits["validation" if held else "train"].append(_problem(example))
        self._judge = Judge(build_math_grader, seconds=seconds)

    @property
    def ungraded(self) -> int:
        return self._judge.ungraded

    def problems(self, split: Split, n: int | None, seed: int = 0) -> list[Problem]:
        """See `Task`; all of them, for None, are in the order of the file."""
        check_count(n)
        rows = self._splits[split]
        if len(rows) < (1 if n is None else n):
            raise ValueError(
                f"{self._path}: {len(rows)} problems for {split}, not {n or 'any'}; ask for fewer, "
                "or change held_out, the share of problems for validation"
            )
        return list(rows) if n is None else random.Random(seed).sample(rows, n)

    def is_correct(self, response: str, problem: Problem) -> bool:
        return self.submit(response, problem)()

    def submit(self, response: str, problem: Problem) -> Callable[[], bool]:
        """See `Task`."""
        if self._whole_numbers:
            right = boxes_number(response, problem.answer)
            return lambda: right
        answer = boxed_answer(response)
        if not answer or answer == problem.answer:
            right = bool(answer)
            return lambda: right
        return self._judge.submit(answer, problem.answer, source=problem.source)

    def demonstration(self, problem: Problem, parallel: bool) -> str | None:
        """The row's own response, if it has one and of that kind."""
        response = problem.data
        return response if response and ("<Parallel>" in response) == parallel else None


def _problem(example: Example) -> Problem:
    answer = (example.ground_truth or "").strip()
    if not answer:
        raise DataError(
            f"{example.source}: no field 'reward_model.ground_truth', or it is empty; "
            "add the right answer"
        )
    return Problem(example.prompt, answer, example.source, data=example.response)
