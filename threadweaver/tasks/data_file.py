"""Problems from a data file, graded as mathematics by math-verify, or as whole numbers."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import replace

from threadweaver.data import DataError, Example, columns_note, load_examples
from threadweaver.grading.judge import Judge
from threadweaver.grading.mathematics import build_math_grader
from threadweaver.tasks.boxed import boxed_answer, boxes_number, stated_answer
from threadweaver.tasks.task import Problem, Split, check_settings, drawn, is_held_out
from threadweaver.trajectory import Prompt

# A ground truth that is a solution, of which the grader is not told where the answer stands.
LONGEST_ANSWER = 200  # characters
_WHOLE_NUMBER = re.compile(r"([0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)(?:\.0*)?")


class DataFile:
    """Prompts and answers of a JSON lines or parquet file, of a folder of them or of those that a
    pattern matches; see `threadweaver.data` for their columns.

    A response, where a row has one, is the demonstration. An answer is right if its box holds the
    same text as the row's ground truth or means the same (threadweaver.grading.mathematics):
    `\\frac{1}{2}`, 0.5. Of a ground truth that is a solution the last box counts, or what follows
    `####` on its last line.

    Args:
        path: of the file or folder, or the pattern.
        held_out: share of the prompts that make up the validation split; which ones depends on
            their text alone. 1: the whole file is for evaluation.
        seconds: most CPU time to grade one answer; one that takes longer is wrong.
        whole_numbers: an answer is right if its box holds decimal digits alone and they equal the
            ground truth as a whole number; needs no math-verify.

    Raises:
        DataError: a row that cannot be used, or one without an answer; names file, row and field.
        ValueError: a setting out of range, or math-verify is not installed.

    Attributes:
        notes: lines to show: what was taken from which columns, and what is held out.
    """

    def __init__(
        self,
        path: str,
        held_out: float = 0.1,
        seconds: float = 2.0,
        whole_numbers: bool = False,
    ):
        check_settings(held_out, seconds)
        if not whole_numbers:
            check_math_verify(path)
        self._path, self._whole_numbers = path, whole_numbers
        self._splits: dict[Split, list[Problem]] = {"train": [], "validation": []}
        examples = load_examples(path, responses=False)
        for example in examples:
            held = is_held_out(_asked(example.prompt), held_out)
            problem = problem_of(example)
            if whole_numbers:
                problem = replace(problem, answer=_whole_numbers(problem))
            self._splits["validation" if held else "train"].append(problem)
        self.notes = [columns_note(path, examples)]
        if prose := sum(
            any(map(_is_prose, answers_of(problem)))
            for problems in self._splits.values()
            for problem in problems
        ):
            self.notes.append(
                f"{path}: {prose:,} of {len(examples):,} right answers are several lines or over "
                f"{LONGEST_ANSWER} characters, without \\boxed{{…}} or '#### …' at the end: hardly "
                "any response can equal them"
            )
        if 0 < held_out < 1:
            held = len(self._splits["validation"])
            self.notes.append(
                f"{path}: held_out {held_out} keeps {held:,} of {len(examples):,} rows for "
                "validation, out of training"
            )
        self._judge = Judge(build_math_grader, seconds=seconds)

    @property
    def ungraded(self) -> int:
        return self._judge.ungraded

    def problems(self, split: Split, n: int | None, seed: int = 0) -> list[Problem]:
        """See `Task`; all of them, for None, are in the order of the file."""
        rows = self._splits[split]
        if len(rows) < (1 if n is None else n):
            raise ValueError(
                f"{self._path}: {len(rows)} problems for {split}, not {n or 'any'}; ask for fewer, "
                "or change held_out, the share of problems for validation"
            )
        return drawn(rows, n, seed, self._path)

    def is_correct(self, response: str, problem: Problem) -> bool:
        return self.submit(response, problem)()

    def submit(self, response: str, problem: Problem) -> Callable[[], bool]:
        """See `Task`."""
        if self._whole_numbers:
            right = any(boxes_number(response, truth) for truth in answers_of(problem))
            return lambda: right
        return submit_mathematics(self._judge, response, problem)

    def demonstration(self, problem: Problem, parallel: bool) -> str | None:
        """The row's own response, if it has one and of that kind."""
        response = problem.data
        return response if response and ("<Parallel>" in response) == parallel else None


def check_math_verify(name: str) -> None:
    """Raises ValueError, which names a task, if its answers cannot be graded here."""
    if importlib.util.find_spec("math_verify") is None:
        raise ValueError(
            f"{name}: grading its answers needs the package 'math-verify'; "
            "install it, or the extra that holds it: threadweaver[tasks]"
        )


def problem_of(example: Example) -> Problem:
    """The problem of a row. Raises DataError for one without an answer."""
    truth = example.ground_truth or ""
    several = [one.strip() for one in ([truth] if isinstance(truth, str) else truth)]
    if not all(several):
        raise DataError(
            f"{example.source}: no field 'reward_model.ground_truth', or it is empty; "
            "add the right answer"
        )
    answer = tuple(several) if len(several) > 1 else several[0]
    return Problem(example.prompt, answer, example.source, data=example.response)


def submit_mathematics(
    judge: Judge, response: str, problem: Problem, *extra: object
) -> Callable[[], bool]:
    """Starts to grade the box of a response by a judge of (answer, *extra, *ground truths)."""
    answer, truths = boxed_answer(response), answers_of(problem)
    if not answer or answer in truths:
        right = bool(answer)
        return lambda: right
    truths = tuple(stated_answer(truth) for truth in truths)
    if answer in truths:
        return lambda: True
    return judge.submit(answer, *extra, *truths, source=problem.source)


def answers_of(problem: Problem) -> tuple[str, ...]:
    """The right answers of a problem, any of which is right."""
    return (problem.answer,) if isinstance(problem.answer, str) else problem.answer


def _is_prose(truth: str) -> bool:
    """Whether a ground truth is longer than an answer, and does not say where the answer stands."""
    stated = stated_answer(truth)
    return "\n" in stated or len(stated) > LONGEST_ANSWER


def _whole_numbers(problem: Problem) -> str | tuple[str, ...]:
    """The right answers in decimal digits alone. Raises DataError for one that is no whole number
    from 0 on."""
    found = [_WHOLE_NUMBER.fullmatch(stated_answer(truth)) for truth in answers_of(problem)]
    for truth, number in zip(answers_of(problem), found, strict=True):
        if not number:
            raise DataError(
                f"{problem.source}: the right answer {truth[-40:]!r} is no whole number from 0 on, "
                "and whole_numbers compares nothing else; correct it, or leave whole_numbers out"
            )
    first, *others = dict.fromkeys(number[1].replace(",", "") for number in found if number)
    return (first, *others) if others else first


def _asked(prompt: Prompt) -> str:
    """What a prompt asks: the same for a question and for a message of it."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(turn["content"] for turn in prompt if turn["role"] == "user")
