"""The interface of a task: problems, a check of answers, and demonstrations if it has them.

Evaluation, self-training, P-GRPO and the writing of data use a task through this alone. A task that
grades in processes of its own also has `submit`, see `GradesInBackground`.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from threadweaver.trajectory import Prompt

Split = Literal["train", "validation"]
MOST_PROBLEMS = 10_000_000


@dataclass(frozen=True)
class Problem:
    """One prompt with what its task needs to grade a response.

    Attributes:
        prompt: what is asked: a question or messages, which the model's chat template makes text.
        answer: the right answer as text, or several of which any is right; empty where many are
            right and none is on record.
        source: where it came from, for messages: file and line, or how it was made.
        data: what else the task needs to grade or demonstrate it; read by the task alone.
    """

    prompt: Prompt
    answer: str | tuple[str, ...]
    source: str
    data: Any = None


class Task(Protocol):
    """Where prompts and answers come from."""

    @property
    def ungraded(self) -> int:
        """Answers so far that count as wrong because their grading ran out of time or crashed."""
        ...

    def problems(self, split: Split, n: int | None, seed: int = 0) -> list[Problem]:
        """`n` problems of a split, chosen and ordered by the seed: same arguments, same problems.

        No question is in both splits, for any numbers and seeds.

        Args:
            n: how many; None: all there are.

        Raises:
            ValueError: there are fewer than `n`; for None, there are none or infinitely many.
        """
        ...

    def is_correct(self, response: str, problem: Problem) -> bool:
        """Whether the last box after the thinking holds a right answer. Never raises for a response
        of any content. A response whose prompt ends with <think> begins with it."""
        ...

    def demonstration(self, problem: Problem, parallel: bool) -> str | None:
        """A right and well-formed response, with or without blocks; None if the task has none."""
        ...


@runtime_checkable
class GradesInBackground(Protocol):
    """A task whose answers are graded while the engine decodes on."""

    def submit(self, response: str, problem: Problem) -> Callable[[], bool]:
        """Starts to grade, and returns at once: what it returns gives `is_correct` when that is
        known, and is called once."""
        ...


def is_held_out(question: str, share: float) -> bool:
    """Whether a question belongs to the validation split, of which it makes up about `share`.

    Depends on the text alone: splits stay apart when problems are added or reordered.
    """
    digest = hashlib.sha256(question.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def check_count(n: int | None) -> None:
    """Raises ValueError for a number of problems below 0, or more than fit into memory."""
    if n is not None and n < 0:
        raise ValueError(f"cannot make {n} problems; ask for at least 0")
    if n is not None and n > MOST_PROBLEMS:
        raise ValueError(f"cannot make {n} problems; ask for at most {MOST_PROBLEMS:,}")


def drawn(problems: Sequence[Problem], n: int | None, seed: int, name: str) -> list[Problem]:
    """`n` of the problems that there are, chosen and ordered by the seed; all in order for None.

    Args:
        name: of them, in the message.

    Raises:
        ValueError: there are fewer, or none.
    """
    check_count(n)
    if len(problems) < (1 if n is None else n):
        raise ValueError(f"{name}: {len(problems)} problems, not {n or 'any'}; ask for fewer")
    return list(problems) if n is None else random.Random(seed).sample(problems, n)


def check_settings(held_out: float, seconds: float) -> None:
    """Raises ValueError for a share of held-out questions or a time limit out of range."""
    if not 0 <= held_out <= 1:
        raise ValueError(f"held_out is {held_out}: it must be a share between 0 and 1")
    if not seconds > 0:
        raise ValueError(f"seconds is {seconds}: it must be above 0")
