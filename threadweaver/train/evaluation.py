"""The evaluation of a model within a run: the same problems in one mode after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console

from threadweaver.evaluate.metrics import Evaluation, evaluate
from threadweaver.generate.engine import Engine
from threadweaver.generate.settings import GenerationSettings
from threadweaver.generate.weaver import Mode
from threadweaver.progress import ResponsesProgress
from threadweaver.tasks import Problem, Task


def evaluate_modes(
    modes: Sequence[Mode],
    engine: Engine,
    task: Task,
    problems: Sequence[Problem],
    generation: GenerationSettings,
    seed: int,
    console: Console,
) -> dict[Mode, Evaluation]:
    """Solves the problems once in each mode, in the order of `modes`, and shows how far it is."""
    evaluations: dict[Mode, Evaluation] = {}
    for mode in modes:
        title = f"evaluating, {mode} mode"
        with ResponsesProgress(console, title, len(problems), engine) as progress:
            evaluations[mode] = evaluate(
                engine,
                task,
                problems,
                replace(generation, mode=mode),
                seed=seed,
                on_progress=progress.decoded,
                on_graded=progress.graded,
            )
    return evaluations
