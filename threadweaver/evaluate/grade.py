"""The grade of a rollout: its answer, format and path lengths; and means over rollouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from math import fsum
from typing import Any, NamedTuple

from threadweaver.generate.rollout import Rollout
from threadweaver.generate.settings import GenerationSettings
from threadweaver.tasks import Problem, Task
from threadweaver.trajectory import Codec, PathLengths, Rendered, violations


@dataclass(frozen=True)
class Graded:
    """A rollout and its grade.

    Attributes:
        response: its text, without the end token.
        correct: whether its answer is right, by the task.
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
    """Grades a rollout that was decoded with these settings."""
    response = codec.decode([id for id in rollout.response if id not in codec.end_ids])
    breaches = violations(codec.prompts.text(problem.prompt), response, settings.max_depth)
    if control := codec.prompts.control_in(response):
        breaches.append(f"line 1: the response holds the control token {control}")
    return Graded(
        problem,
        rollout,
        response,
        task.is_correct(response, problem),
        breaches,
        settings.path_lengths(rollout.response, codec),
    )


def graded_row(graded: Graded) -> dict[str, Any]:
    """A rollout and its grade, for JSON."""
    return {
        "question": graded.problem.prompt,
        **({"rendered": True} if isinstance(graded.problem.prompt, Rendered) else {}),
        "ground_truth": graded.problem.answer,
        "response": graded.response,
        "correct": graded.correct,
        "violations": graded.violations,
        **graded.lengths.as_dict(),
        "decode_steps": graded.rollout.decode_steps,
        "limits": asdict(graded.rollout.limits),
        "source": graded.problem.source,
    }


class Metric(NamedTuple):
    """A mean over responses, or the ratio of two sums over them.

    Attributes:
        value: what is summed.
        per: what the sum is divided by the sum of; by default the number of responses.
        is_share: whether `value` is 0 or 1.
    """

    value: Callable[[Graded], float]
    per: Callable[[Graded], float] = lambda graded: 1
    is_share: bool = False


# By the name that every table, file and plot uses.
METRICS = {
    "accuracy": Metric(lambda g: g.correct, is_share=True),
    "format": Metric(lambda g: not g.violations, is_share=True),
    "activation": Metric(lambda g: g.lengths.blocks > 0, is_share=True),
    "threads_per_block": Metric(
        lambda g: g.lengths.blocks * g.lengths.mean_threads_per_block, lambda g: g.lengths.blocks
    ),
    "total_tokens": Metric(lambda g: g.lengths.total_tokens),
    "longest_path_tokens": Metric(lambda g: g.lengths.longest_path_tokens),
    "acceleration": Metric(lambda g: g.lengths.acceleration),
}


def summary(graded: Sequence[Graded]) -> dict[str, float]:
    """METRICS over rollouts; a ratio is 0 where its denominator is."""
    found = {}
    for name, metric in METRICS.items():
        below = fsum(map(metric.per, graded))
        found[name] = fsum(map(metric.value, graded)) / below if below else 0.0
    return found
