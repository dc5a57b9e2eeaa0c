"""Solving problems with a model on the engine: every metric of docs/semantics.md, "Path metrics".

engine, tokenizer = load_engine(model, EngineSettings(), parallel=True)
evaluation = evaluate(engine, task, task.problems("validation", 200), GenerationSettings())
evaluation.metrics()["accuracy"]
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from threadweaver.evaluate.grade import METRICS, Graded, Metric
from threadweaver.evaluate.intervals import Estimate, ratio, share
from threadweaver.evaluate.rollouts import Grading, decode
from threadweaver.generate.engine import Engine
from threadweaver.generate.settings import GenerationSettings
from threadweaver.tasks import Problem, Task

_OF_EVALUATIONS = {
    "speedup": Metric(METRICS["total_tokens"].value, METRICS["longest_path_tokens"].value),
    "decode_steps": Metric(lambda g: g.rollout.decode_steps),
}


@dataclass(frozen=True)
class Evaluation:
    """The graded responses to problems, and the time they took.

    Attributes:
        settings: of every response.
        samples: responses to each problem.
        graded: the responses; `samples` of the first problem, then of the second, and so on. In
            sequential mode all tokens of one are on its longest path.
        ungraded: answers that count as wrong because their grading did not end.
        seconds: wall-clock of decoding.
    """

    settings: GenerationSettings
    samples: int
    graded: list[Graded] = field(repr=False)
    ungraded: int
    seconds: float

    def metrics(self) -> dict[str, Estimate]:
        """By name, in the order of a report. Shares have Wilson's interval, means and ratios one by
        bootstrap (threadweaver.evaluate.intervals). What no response gives a value for is left out.

            accuracy             share of right answers (mean@k for k samples a problem)
            pass@k               share of problems with a right answer among its k samples, k > 1
            format               share that is well formed
            activation           share with a block
            threads_per_block    all threads over all blocks
            total_tokens, longest_path_tokens, decode_steps    means over responses
            acceleration         mean of 1 - longest path / total
            redundancy           8-grams of threads that stand in a sibling, over all of them
            speedup              all tokens over all tokens on longest paths
        """
        found: dict[str, Estimate] = {}
        for name, metric in {**METRICS, **_OF_EVALUATIONS}.items():
            values = self._per_response(metric.value)
            if metric.is_share:
                found[name] = share(values.mean(1))
            elif estimate := ratio(values.sum(1), self._per_response(metric.per).sum(1)):
                found[name] = estimate
            if name == "accuracy" and self.samples > 1:
                found[f"pass@{self.samples}"] = share(values.max(1))
        return found

    @property
    def problems(self) -> list[Problem]:
        return [g.problem for g in self.graded[:: self.samples]]

    @property
    def max_speedup(self) -> float | None:
        """Largest total / longest path of a right answer; None if there is none."""
        right = [g.lengths for g in self.graded if g.correct]
        return max((r.total_tokens / r.longest_path_tokens for r in right), default=None)

    @property
    def tokens_per_second(self) -> float:
        """Sampled tokens."""
        return sum(g.rollout.num_sampled_tokens for g in self.graded) / self.seconds

    @property
    def limits(self) -> dict[str, int]:
        """LimitCounts summed over all responses."""
        counts = Counter({"response": 0, "threads": 0, "outlines": 0, "blocks": 0})
        for g in self.graded:
            counts.update(asdict(g.rollout.limits))
        return dict(counts)

    @property
    def no_answer(self) -> int:
        """Responses that are wrong because they box nothing."""
        return sum(g.no_answer for g in self.graded)

    def by_problem(self, value: Callable[[Graded], float]) -> NDArray[np.float64]:
        """Means over the samples of each problem, [P]."""
        return self._per_response(value).mean(1)

    def as_dict(self) -> dict[str, Any]:
        """All figures, for JSON."""
        return {
            "problems": len(self.problems),
            "samples": self.samples,
            "settings": asdict(self.settings),
            **{name: asdict(estimate) for name, estimate in self.metrics().items()},
            "max_speedup": self.max_speedup,
            "limits": self.limits,
            "no_answer": self.no_answer,
            "ungraded": self.ungraded,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
        }

    def _per_response(self, value: Callable[[Graded], float]) -> NDArray[np.float64]:
        """[P, samples]."""
        values = [value(g) for g in self.graded]
        return np.array(values, np.float64).reshape(-1, self.samples)


@dataclass(frozen=True)
class Comparison:
    """Parallel mode against sequential mode, of the same model or of two.

    Attributes:
        speedup: mean total tokens in sequential mode over mean longest path in parallel mode.
        max_speedup: the largest such ratio of a single problem that both solve; None if none.
        wall_clock_speedup: seconds of the sequential evaluation over those of the parallel one.
        accuracy_difference: accuracy with threads minus accuracy without.
    """

    speedup: Estimate
    max_speedup: float | None
    wall_clock_speedup: float
    accuracy_difference: Estimate


def compare(sequential: Evaluation, parallel: Evaluation) -> Comparison:
    """Compares two evaluations on the same problems; intervals are by bootstrap over them.

    Raises:
        ValueError: they are not on the same problems.
    """
    if sequential.problems != parallel.problems:
        raise ValueError("the two evaluations are not on the same problems")
    total = sequential.by_problem(lambda g: g.lengths.total_tokens)
    longest = parallel.by_problem(lambda g: g.lengths.longest_path_tokens)
    before, after = (e.by_problem(lambda g: g.correct) for e in (sequential, parallel))
    both = (before > 0) & (after > 0)
    speedup, difference = ratio(total, longest), ratio(after - before, np.ones(len(total)))
    assert speedup and difference  # no response is empty
    return Comparison(
        speedup,
        float((total[both] / longest[both]).max()) if both.any() else None,
        sequential.seconds / parallel.seconds,
        difference,
    )


def evaluate(
    engine: Engine,
    task: Task,
    problems: Sequence[Problem],
    settings: GenerationSettings,
    *,
    samples: int = 1,
    seed: int = 0,
    at_once: int | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
    on_graded: Callable[[int], None] = lambda count: None,
) -> Evaluation:
    """Solves problems and grades the answers.

    Args:
        engine: with no work of its own.
        problems: at least one; their prompts are taken as they stand.
        samples: responses to each.
        seed: of the draws; the same seed, model and settings give the same responses.
        at_once: problems decoded at the same time; None: as many as the engine takes. 1 measures
            what one user waits for.
        on_progress: gets the number of responses that are decoded, after every step.
        on_graded: gets the number of those that are graded, after each.

    Raises:
        ValueError: a prompt or setting that the engine refuses; names the problem.
        NonFiniteLogits: from the engine.
    """
    ungraded, start = task.ungraded, time.perf_counter()
    grading = Grading(problems, samples, task, engine.codec)
    rollouts = decode(
        engine,
        problems,
        settings,
        samples=samples,
        seed=(seed,),
        at_once=at_once,
        on_progress=on_progress,
        on_response=grading.submit,
    )
    seconds = time.perf_counter() - start
    graded = grading.finish(rollouts, settings, on_graded)
    return Evaluation(settings, samples, graded, task.ungraded - ungraded, seconds)
