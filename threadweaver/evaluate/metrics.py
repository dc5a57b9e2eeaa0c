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

from threadweaver import ranks
from threadweaver.evaluate.grade import METRICS, Graded, Metric
from threadweaver.evaluate.intervals import Estimate, ratio, share
from threadweaver.evaluate.record import Record
from threadweaver.evaluate.rollouts import Grading, decode, of_all_ranks
from threadweaver.generate.decoder import Decoder
from threadweaver.generate.rollout import Rollout
from threadweaver.generate.settings import GenerationSettings
from threadweaver.progress import Pace
from threadweaver.tasks import Problem, Task

COLLECT_SECONDS = 0.5  # between two times that the first rank writes what the others decoded

_OF_EVALUATIONS = {
    "speedup": Metric(METRICS["total_tokens"].value, METRICS["longest_path_tokens"].value),
    # A server says nothing of its steps.
    "decode_steps": Metric(lambda g: g.counts.decode_steps, lambda g: g.counts.decode_steps > 0),
    "latency_seconds": Metric(lambda g: g.counts.seconds, lambda g: g.counts.seconds > 0),
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
        resumed: how many of the responses were there already.
    """

    settings: GenerationSettings
    samples: int
    graded: list[Graded] = field(repr=False)
    ungraded: int
    seconds: float
    resumed: int = 0

    def metrics(self) -> dict[str, Estimate]:
        """By name, in the order of a report. Shares have Wilson's interval, means and ratios one by
        bootstrap (threadweaver.evaluate.intervals). What no response gives a value for is left out.

            accuracy             share of right answers: avg@k for k samples a problem
            pass@k               share of problems with a right answer among k samples, k > 1: for
                                 powers of two and all samples, estimated without bias from all
            format               share that is well formed
            activation           share with a block
            threads_per_block    all threads over all blocks
            total_tokens, longest_path_tokens, decode_steps, latency_seconds    means over responses
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
            if name == "accuracy":
                for k in _powers_of_two(self.samples):
                    found[f"pass@{k}"] = share(pass_at(k, values.sum(1), self.samples))
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
        return sum(g.counts.num_sampled_tokens for g in self.graded) / self.seconds

    @property
    def limits(self) -> dict[str, int]:
        """LimitCounts summed over all responses."""
        counts = Counter({"response": 0, "threads": 0, "outlines": 0, "blocks": 0})
        for g in self.graded:
            counts.update(asdict(g.counts.limits))
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
            "resumed": self.resumed,
            "tokens_per_second": self.tokens_per_second,
        }

    def _per_response(self, value: Callable[[Graded], float]) -> NDArray[np.float64]:
        """[P, samples]."""
        values = [value(g) for g in self.graded]
        return np.array(values, np.float64).reshape(-1, self.samples)


def pass_at(k: int, right: NDArray[np.float64], samples: int) -> NDArray[np.float64]:
    """For each problem the share of all choices of k of its samples that hold a right answer, [P]:
    the unbiased estimate of pass@k (Chen et al., arXiv 2107.03374).

    Args:
        right: how many of its samples are right, [P].
    """
    # 1 - C(samples - right, k) / C(samples, k), as a product of factors of at most 1.
    i = np.arange(samples)
    factors = np.where(i[None, :] >= (samples - right)[:, None], 1 - k / (i[None, :] + 1), 1.0)
    return 1 - np.clip(factors, 0, None).prod(1)


def _powers_of_two(most: int) -> list[int]:
    """2, 4, 8, ... below `most`, and `most`; none below 2."""
    powers = [2**i for i in range(1, most.bit_length()) if 2**i < most]
    return [*powers, most] if most > 1 else []


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
    engine: Decoder,
    task: Task,
    problems: Sequence[Problem],
    settings: GenerationSettings,
    *,
    samples: int = 1,
    seed: int = 0,
    at_once: int | None = None,
    record: Record | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
    on_graded: Callable[[int], None] = lambda count: None,
) -> Evaluation:
    """Solves problems and grades the answers. All ranks call it together, and get all of it.

    Args:
        engine: with no work of its own.
        problems: at least one; their prompts are taken as they stand.
        samples: responses to each.
        seed: of the draws; the same seed, model and settings give the same responses.
        at_once: problems that a rank decodes at the same time; None: as many as the engine takes. 1
            measures what one user waits for.
        record: keeps every response when it is done, and has those of an earlier start.
        on_progress: gets the number of responses that are there, of this rank, after every step.
        on_graded: gets the number of those that are graded, after each.

    Raises:
        ValueError: a prompt or setting that the engine refuses; names the problem.
        NonFiniteLogits: from the engine.
    """
    ungraded = task.ungraded
    grading = Grading(problems, samples, task, engine.codec, settings)
    known: set[int] = set()
    before = record.elapsed if record else 0.0
    for number, rollout in record.known(engine, problems) if record else ():
        grading.submit(number, rollout)
        known.add(number)
    start, pace = time.perf_counter(), Pace(COLLECT_SECONDS)

    def elapsed() -> float:
        return before + time.perf_counter() - start

    def on_response(number: int, rollout: Rollout) -> None:
        text = grading.submit(number, rollout)
        if record is not None:
            record.add(number, rollout, text, elapsed())

    def on_step(done: int) -> None:
        if record is not None and pace.due():
            record.collect(elapsed())
        on_progress(done)

    try:
        done = decode(
            engine,
            problems,
            settings,
            samples=samples,
            seed=(seed,),
            at_once=at_once,
            known=known,
            on_progress=on_step,
            on_response=on_response,
        )
        own = time.perf_counter() - start if done > len(known) else 0.0
        graded = grading.finish(on_graded)
        all_graded = of_all_ranks(graded, problems, samples, lambda: on_step(done))
    finally:
        if record is not None:
            record.collect(elapsed())
    seconds, resumed = max(ranks.gather(own)), ranks.from_first(len(known))
    [ungraded] = ranks.sums([task.ungraded - ungraded])
    return Evaluation(
        settings, samples, all_graded, int(ungraded), ranks.from_first(before) + seconds, resumed
    )
