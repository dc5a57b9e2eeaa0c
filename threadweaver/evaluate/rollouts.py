"""Responses to the problems of a task: queued on an engine, decoded, graded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence

from threadweaver.evaluate.grade import Graded, grade
from threadweaver.generate.engine import Engine, Generation
from threadweaver.generate.rollout import Rollout
from threadweaver.generate.sampler import stream_key
from threadweaver.generate.settings import GenerationSettings
from threadweaver.tasks import Problem, Task
from threadweaver.trajectory import Codec


def queue(
    engine: Engine,
    problems: Sequence[Problem],
    settings: GenerationSettings,
    *,
    samples: int = 1,
    seed: Sequence[int] = (0,),
    first: int = 0,
) -> list[Generation]:
    """Adds `samples` responses to each problem to an engine, in the order of the problems.

    Args:
        seed: of the draws, with the numbers of problem and sample. The same seed, model, problems
            and settings give the same responses.
        first: number of the first problem, if these are a part of a longer list.

    Raises:
        ValueError: a prompt or setting that the engine refuses; names the problem.
    """
    generations = []
    for i, problem in enumerate(problems, first):
        prompt = engine.codec.encode(problem.prompt)
        try:
            for j in range(samples):
                key = stream_key((*seed, i, j))
                generations.append(engine.add(prompt, settings, key))
        except ValueError as error:
            raise ValueError(f"{problem.source}: {error}") from error
    return generations


def roll_out(
    engine: Engine,
    task: Task,
    problems: Sequence[Problem],
    settings: GenerationSettings,
    *,
    samples: int = 1,
    seed: Sequence[int] = (0,),
    on_progress: Callable[[int], None] = lambda done: None,
    on_graded: Callable[[int], None] = lambda count: None,
) -> list[Graded]:
    """Decodes `samples` responses to each problem and grades them; in the order of `queue`.

    Args:
        on_progress: gets the number of responses that are decoded, after every step.
        on_graded: gets the number of those that are graded, after each.

    Raises:
        ValueError: as `queue`.
        NonFiniteLogits: from the engine.
    """
    queued = len(queue(engine, problems, settings, samples=samples, seed=seed))
    rollouts = engine.run(lambda _: on_progress(queued - engine.unfinished))
    return grade_all(problems, rollouts, task, engine.codec, settings, on_graded)


def grade_all(
    problems: Sequence[Problem],
    rollouts: Sequence[Rollout],
    task: Task,
    codec: Codec,
    settings: GenerationSettings,
    on_graded: Callable[[int], None],
) -> list[Graded]:
    """Grades rollouts, equally many a problem and in the order of the problems; `on_graded` gets
    the number of graded ones after each."""
    samples = len(rollouts) // len(problems)
    graded: list[Graded] = []
    for i, rollout in enumerate(rollouts):
        graded.append(grade(problems[i // samples], rollout, task, codec, settings))
        on_graded(len(graded))
    return graded


def fingerprint(problems: Sequence[Problem]) -> str:
    """SHA-256 of the prompts and answers, in order; hexadecimal."""
    digest = hashlib.sha256()
    for problem in problems:
        digest.update(json.dumps([problem.prompt, problem.answer]).encode())
    return digest.hexdigest()
