"""P-GRPO in one process or on ranks, with what a test needs of its rollouts."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.train.conftest import Run
from tests.train.on_ranks import Ended, on_ranks
from threadweaver import ranks
from threadweaver.evaluate.grade import Graded
from threadweaver.generate.engine import Engine
from threadweaver.tasks import Problem
from threadweaver.train import rl

PROMPTS = [f"{i}?\n" for i in range(7)]


class LetterTask:
    """Right is what begins with a low letter: about every other response of a new model."""

    ungraded = 0

    def problems(self, split, n, seed=0):
        return [Problem(prompt, "", f"prompt {i}") for i, prompt in enumerate(PROMPTS)][:n]

    def is_correct(self, response: str, problem: Problem) -> bool:
        return bool(response) and ord(response[0]) < 64


def prepare(patch: pytest.MonkeyPatch, script: Path | None, dump: Path | None) -> None:
    """Sets up this process.

    Args:
        script: a file of completions to take instead of sampled ones, by `record`.
        dump: folder for the responses of each batch that this rank decoded.
    """
    patch.setattr(rl, "load_task", lambda *_, **__: LetterTask())
    if script is not None:
        recorded = pickle.loads(script.read_bytes())
        add = Engine.add

        def scripted(self, prompt, settings, seed=0):
            return add(self, prompt, settings, seed, script=recorded[seed])

        patch.setattr(Engine, "add", scripted)
    if dump is not None:
        patch.setattr(rl, "roll_out", partial(roll_out, rl.roll_out, dump))


def roll_out(inner: Callable[..., list[Graded]], dump: Path, *args, **options) -> list[Graded]:
    graded = inner(*args, **options)
    own = {i: (g.problem.source, g.rollout.response) for i, g in enumerate(graded) if g.rollout}
    file = dump / f"{options['seed'][1]}.{ranks.rank()}"
    file.write_bytes(pickle.dumps(own))
    return graded


def in_one_process(run: Run, script: Path | None = None, dump: Path | None = None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        prepare(patch, script, dump)
        assert run() == 0


def record(run: Run, script: Path) -> None:
    """Runs in one process, and keeps the completions of all rollouts."""
    generations = []
    add = Engine.add

    def recording(self, prompt, settings, seed=0):
        generation = add(self, prompt, settings, seed)
        generations.append((seed, generation))
        return generation

    with pytest.MonkeyPatch.context() as patch:
        prepare(patch, None, None)
        patch.setattr(Engine, "add", recording)
        assert run() == 0
    found = {
        seed: {id: list(completion.tokens) for id, completion in generation.completions.items()}
        for seed, generation in generations
    }
    script.write_bytes(pickle.dumps(found))


def together(
    run: Run, folder: Path, count: int, script: Path | None = None, dump: Path | None = None
) -> Ended:
    return on_ranks(run.arguments(), folder, count, before=partial(_before, script, dump))


def _before(script: Path | None, dump: Path | None, rank: int) -> None:
    prepare(pytest.MonkeyPatch(), script, dump)
