"""The grade of a rollout: its answer, format and path lengths; and means over rollouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from math import fsum
from typing import Any, NamedTuple

from threadweaver.generate.rollout import Rollout, RolloutCounts
from threadweaver.generate.settings import GenerationSettings
from threadweaver.tasks import GradesInBackground, Problem, Task
from threadweaver.tasks.boxed import boxed_answer
from threadweaver.trajectory import (
    Codec,
    PathLengths,
    Redundancy,
    Rendered,
    opened_thinking,
    redundancy,
    violations,
)


@dataclass(frozen=True)
class Graded:
    """A rollout and its grade.

    Attributes:
        rollout: None if another rank decoded it, or it is not asked for.
        counts: of it.
        response: its text, without the end token.
        correct: whether its answer is right, by the task.
        no_answer: whether it is wrong because it boxes nothing after its thinking.
        violations: of the format, a <think> that the prompt ends with included.
        lengths: of its paths, the end token counted; in sequential mode all of it is one path.
        redundancy: of its threads.
    """

    problem: Problem = field(repr=False)
    rollout: Rollout | None = field(repr=False)
    counts: RolloutCounts
    response: str
    correct: bool
    no_answer: bool
    violations: list[str]
    lengths: PathLengths
    redundancy: Redundancy


class Submitted(NamedTuple):
    """A response that is being graded.

    Attributes:
        text: of it, without the end token.
        is_correct: waits for the verdict; called once.
    """

    text: str
    is_correct: Callable[[], bool]


def submit(problem: Problem, response: Sequence[int], task: Task, codec: Codec) -> Submitted:
    """Starts to grade the ids of a response if the task can do so in the background; else it is
    graded in the caller's thread, when the verdict is asked for. The task gets a <think> that the
    prompt ends with too, so that a thought without an end has no answer."""
    text = codec.decode([id for id in response if id not in codec.end_ids])
    whole = opened_thinking(codec.prompts.text(problem.prompt)) + text
    if isinstance(task, GradesInBackground):
        return Submitted(text, task.submit(whole, problem))
    return Submitted(text, partial(task.is_correct, whole, problem))


def grade(
    problem: Problem,
    rollout: Rollout,
    submitted: Submitted,
    codec: Codec,
    settings: GenerationSettings,
) -> Graded:
    """The grade of a rollout that was decoded with these settings, and submitted."""
    response, prompt = submitted.text, codec.prompts.text(problem.prompt)
    breaches = violations(prompt, response, settings.max_depth)
    if control := codec.prompts.control_in(response):
        breaches.append(f"line 1: the response holds the control token {control}")
    correct = submitted.is_correct()
    return Graded(
        problem,
        rollout,
        rollout.counts,
        response,
        correct,
        not correct and not boxed_answer(opened_thinking(prompt) + response),
        breaches,
        settings.path_lengths(rollout.response, codec),
        redundancy(response, max_depth=settings.max_depth),
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
        "redundancy": graded.redundancy.share,
        "decode_steps": graded.counts.decode_steps,
        "limits": asdict(graded.counts.limits),
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
    "redundancy": Metric(lambda g: g.redundancy.repeated, lambda g: g.redundancy.grams),
}


def summary(graded: Sequence[Graded]) -> dict[str, float]:
    """METRICS over rollouts; a ratio is 0 where its denominator is."""
    found = {}
    for name, metric in METRICS.items():
        below = fsum(map(metric.per, graded))
        found[name] = fsum(map(metric.value, graded)) / below if below else 0.0
    return found
