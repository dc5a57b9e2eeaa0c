"""Rollouts of a model in training, by the engine in its own process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence

from threadweaver.generate.engine import Engine, Token
from threadweaver.generate.rollout import Rollout
from threadweaver.generate.sampler import stream_key
from threadweaver.generate.settings import GenerationSettings
from threadweaver.grading import Graded, grade
from threadweaver.tasks import Problem, Task
from threadweaver.train.config import ConfigError
from threadweaver.trajectory import Codec


def roll_out(
    engine: Engine,
    problems: Sequence[Problem],
    samples: int,
    settings: GenerationSettings,
    seed: Sequence[int],
    on_step: Callable[[list[Token]], None] | None = None,
) -> list[list[Rollout]]:
    """`samples` rollouts of each problem.

    Args:
        seed: numbers that tell these rollouts from all others of the run. The same ones, the same
            model and problems give the same rollouts.

    Raises:
        ValueError: a prompt that cannot be decoded; names its source.
    """
    for i, problem in enumerate(problems):
        prompt = engine.codec.encode(problem.prompt)
        for sample in range(samples):
            try:
                engine.add(prompt, settings, stream_key((*seed, i, sample)))
            except ValueError as error:
                raise ConfigError(f"{problem.source}: {error}") from error
    rollouts = engine.run(on_step)
    return [rollouts[i : i + samples] for i in range(0, len(rollouts), samples)]


def grade_groups(
    problems: Sequence[Problem],
    groups: Sequence[Sequence[Rollout]],
    task: Task,
    codec: Codec,
    settings: GenerationSettings,
) -> list[list[Graded]]:
    """Every rollout judged, group by group."""
    depth = settings.max_depth if settings.mode == "parallel" else 0
    return [
        [grade(problem, rollout, task, codec, depth) for rollout in group]
        for problem, group in zip(problems, groups, strict=True)
    ]


def fingerprint(problems: Sequence[Problem]) -> str:
    """Same prompts and answers in the same order: same value."""
    digest = hashlib.sha256()
    for problem in problems:
        digest.update(json.dumps([problem.prompt, problem.answer]).encode())
    return digest.hexdigest()
