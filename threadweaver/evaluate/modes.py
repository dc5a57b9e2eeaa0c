"""Evaluation in several modes: the same problems, solved in one mode after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console

from threadweaver import ranks
from threadweaver.evaluate.metrics import Evaluation, evaluate
from threadweaver.evaluate.progress import SharedProgress
from threadweaver.evaluate.record import Record
from threadweaver.generate.decoder import Decoder
from threadweaver.generate.response_log import ResponseLog
from threadweaver.generate.settings import GenerationSettings
from threadweaver.generate.weaver import Mode
from threadweaver.tasks import Problem, Task


def evaluate_modes(
    modes: Sequence[Mode],
    engine: Decoder,
    task: Task,
    problems: Sequence[Problem],
    generation: GenerationSettings,
    console: Console,
    *,
    samples: int = 1,
    seed: int = 0,
    at_once: int | None = None,
    log: ResponseLog | None = None,
) -> dict[Mode, Evaluation]:
    """Evaluates in each mode, in the order of `modes`, and shows the progress on `console`.

    All ranks call it together. Every response goes to `log` of the first rank, and those that it
    has are not decoded again. The other arguments and the errors are those of `evaluate`; the mode
    of `generation` is ignored.
    """
    is_kept = ranks.from_first(log is not None)
    evaluations: dict[Mode, Evaluation] = {}
    for mode in modes:
        title = f"evaluating, {mode} mode"
        settings = replace(generation, mode=mode)
        with SharedProgress(console, title, len(problems) * samples, engine) as progress:
            evaluations[mode] = evaluate(
                engine,
                task,
                problems,
                settings,
                samples=samples,
                seed=seed,
                at_once=at_once,
                record=Record(log, settings, samples) if is_kept else None,
                on_progress=progress.decoded,
                on_graded=progress.graded,
            )
    return evaluations
