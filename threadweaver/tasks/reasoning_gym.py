"""Problems made by the package reasoning-gym, graded by its own scorers."""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import fields
from itertools import count
from typing import Any

from threadweaver.grading.gym import build_scorer
from threadweaver.grading.judge import Judge
from threadweaver.tasks.boxed import boxed_answer
from threadweaver.tasks.task import Problem, Split, check_count, check_settings, is_held_out

INSTRUCTION = "\n\nPut the final answer, as plain text, in \\boxed{}.\n"

# One dataset object makes this many problems: some make all of theirs when they are built.
CHUNK = 500
# After this many problems without a new question there are taken to be no more.
PATIENCE = 2000

# Datasets that iterate over sets of strings, whose order differs from process to process.
UNORDERED = (
    "codeio",
    "isomorphic_strings",
    "list_functions",
    "polynomial_multiplication",
    "ransom_note",
    "word_ladder",
)


class ReasoningGym:
    """A dataset of reasoning-gym: as many problems as it makes different questions.

    An answer is right if the dataset's scorer gives the text of the box the full mark. There are no
    demonstrations.

    Args:
        dataset: its name in reasoning-gym, one of `dataset_names()`.
        held_out: share of the questions that make up the validation split; which ones depends on
            their text alone, so the questions of the other split are made too.
        seconds: most CPU time to grade one answer; one that takes longer is wrong.
        options: of the dataset.

    Raises:
        ValueError: an option that the dataset does not have or take.
    """

    def __init__(self, dataset: str, held_out: float = 0.25, seconds: float = 5.0, **options: Any):
        check_settings(held_out, seconds)
        if dataset in UNORDERED and os.environ.get("PYTHONHASHSEED", "random") == "random":
            raise ValueError(
                f"reasoning_gym:{dataset} makes other problems in every process; "
                "set the environment variable PYTHONHASHSEED=0 to make it repeatable"
            )
        self._name = f"reasoning_gym:{dataset}"
        self._dataset = dataset
        self._options = options
        self._held_out = held_out
        self._check_options()
        self._judge = Judge(build_scorer, dataset, options, seconds=seconds)

    @property
    def ungraded(self) -> int:
        return self._judge.ungraded

    def problems(self, split: Split, n: int | None, seed: int = 0) -> list[Problem]:
        """See `Task`. Each has another question."""
        if n is None:
            raise ValueError(
                f"{self._name} makes problems on demand: say how many (--n, task.problems)"
            )
        check_count(n)
        problems: list[Problem] = []
        asked: set[str] = set()
        barren = 0
        for source, entry in self._entries(seed):
            if len(problems) == n:
                break
            question = entry["question"]
            barren += 1
            if question not in asked and is_held_out(question, self._held_out) == (
                split == "validation"
            ):
                asked.add(question)
                # Some datasets accept many answers and record none.
                answer = "" if entry["answer"] is None else str(entry["answer"])
                problems.append(Problem(question + INSTRUCTION, answer, source, data=entry))
                barren = 0
            if barren == PATIENCE:
                raise ValueError(
                    f"{self._name} made only {len(problems)} different {split} questions, not {n}; "
                    "ask for fewer or for harder ones, or change held_out"
                )
        return problems

    def is_correct(self, response: str, problem: Problem) -> bool:
        return self.submit(response, problem)()

    def submit(self, response: str, problem: Problem) -> Callable[[], bool]:
        """See `Task`."""
        answer = boxed_answer(response)
        if answer is None:
            return lambda: False
        return self._judge.submit(answer, problem.data, source=problem.source)

    def demonstration(self, problem: Problem, parallel: bool) -> None:
        """None: reasoning-gym has answers without reasoning."""

    def _check_options(self) -> None:
        from reasoning_gym.factory import DATASETS

        names = {field.name for field in fields(DATASETS[self._dataset][1])} - {"seed", "size"}
        for name in self._options:
            if name not in names:
                has = ", ".join(sorted(names | {"held_out", "seconds"}))
                raise ValueError(f"{self._name} has no option '{name}'; it has {has}")
        try:
            _create(self._dataset, seed=0, size=1, **self._options)
        except (AssertionError, TypeError, ValueError) as error:
            raise ValueError(f"{self._name}: {error or 'an option is out of range'}") from error

    def _entries(self, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """Endless pairs of a problem's source and the problem as reasoning-gym makes it."""
        for chunk in count():
            # A problem depends on the sum of seed and index: neighbouring seeds would overlap.
            chunk_seed = random.Random(f"{seed} {chunk}").getrandbits(31)
            dataset = _create(self._dataset, seed=chunk_seed, size=CHUNK, **self._options)
            for i in range(CHUNK):
                try:
                    entry = dataset[i]
                except IndexError as error:
                    if i == 0:
                        raise ValueError(f"{self._name} made no problem: {error}") from error
                    break  # a dataset that ends early
                yield f"{self._name}, seed {chunk_seed}, problem {i}", entry


def dataset_names() -> list[str]:
    """The datasets there are. Raises ValueError if reasoning-gym is not installed."""
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ValueError(
            "reasoning_gym tasks need the package 'reasoning-gym'; "
            "install it, or the extra that holds it: threadweaver[tasks]"
        )
    from reasoning_gym.factory import DATASETS

    return sorted(set(DATASETS) - {"composite"})  # which is a mixture of the others


def _create(dataset: str, **options: Any) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(dataset, **options)
