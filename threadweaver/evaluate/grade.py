"""What a rollout is worth: whether its answer is right, its form, its length, its reward."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from threadweaver.generate.rollout import Rollout
from threadweaver.generate.settings import GenerationSettings
from threadweaver.tasks import Problem, Task
from threadweaver.trajectory import Codec, PathLengths, check_format

METRICS = (
    "accuracy",
    "format",
    "activation",
    "threads_per_block",
    "total_tokens",
    "longest_path_tokens",
    "acceleration",
)


@dataclass(frozen=True)
class Graded:
    """A rollout, judged.

    Attributes:
        response: its text, without the end token.
        correct: whether the task takes its answer for right.
        violations: of the format, a <think> that the prompt ends with included.
        lengths: of its paths, the end token counted; in sequential mode all of it is one path.
    """

    problem: Problem = field(repr=False)
    rollout: Rollout = field(repr=False)
    response: str
    correct: bool
    violations: list[str]
    lengths: PathLengths


def grade(
    problem: Problem, rollout: Rollout, task: Task, codec: Codec, settings: GenerationSettings
) -> Graded:
    """Judges a rollout that was decoded with these settings."""
    response = codec.decode([id for id in rollout.response if id != codec.eos_id])
    return Graded(
        problem,
        rollout,
        response,
        task.is_correct(response, problem),
        violations(problem.prompt, response, settings.max_depth),
        settings.path_lengths(rollout.response, codec),
    )


def violations(prompt: str, response: str, max_depth: int = 1) -> list[str]:
    """What is wrong with a response's format, a <think> that the prompt ends with included."""
    opened = "<think>" if prompt.rstrip().endswith("<think>") else ""
    return check_format(opened + response, max_depth=max_depth)


def summary(graded: Sequence[Graded]) -> dict[str, float]:
    """METRICS, the means over rollouts of what SPEC names ("Path metrics"); activation is the share
    of responses with a block."""

    def mean(values: Iterable[Any]) -> float:
        return statistics.fmean(map(float, values))

    total = mean(g.lengths.total_tokens for g in graded)
    longest = mean(g.lengths.longest_path_tokens for g in graded)
    blocks = sum(g.lengths.blocks for g in graded)
    threads = sum(g.lengths.blocks * g.lengths.mean_threads_per_block for g in graded)
    return {
        "accuracy": mean(g.correct for g in graded),
        "format": mean(not g.violations for g in graded),
        "activation": mean(g.lengths.blocks > 0 for g in graded),
        "threads_per_block": threads / blocks if blocks else 0.0,
        "total_tokens": total,
        "longest_path_tokens": longest,
        "acceleration": mean(g.lengths.acceleration for g in graded),
    }
