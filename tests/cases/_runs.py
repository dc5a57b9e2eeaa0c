"""Runs of a second that the cases share."""

import json
from pathlib import Path
from unittest.mock import patch

from tests.architecture import SMALL
from threadweaver.tasks import Problem
from threadweaver.train.__main__ import main

ARCH = {**SMALL, "max_position_embeddings": 256}
COMPUTE = {"compute.device": "cpu", "compute.precision": "fp32", "compute.threads": 1}


class Task:
    """Four problems; a stand-in for a task."""

    ungraded = 0

    def problems(self, split, n, seed=0) -> list[Problem]:
        return [Problem(f"{i}?\n", "7", f"row {i}") for i in range(4)]

    def is_correct(self, response: str, problem: Problem) -> bool:
        raise NotImplementedError

    def demonstration(self, problem: Problem, parallel: bool) -> None:
        return None


class ByLength(Task):
    """Any task with a signal."""

    def is_correct(self, response: str, problem: Problem) -> bool:
        return sum(map(ord, response)) % 2 == 0


def train(kind: str, options: dict) -> int:
    """The exit code."""
    options = {**COMPUTE, **options}
    return main([kind, *(f"--{name}={value}" for name, value in options.items())])


def first_record(base: Path, settings: dict, task: Task | None = None) -> dict | None:
    """What P-GRPO reports of its first step on a task; None if it ends with an error."""
    options = {
        "run_dir": base.parent / "run",
        "model.path": base,
        "rollouts.problems": 4,
        "rollouts.samples": 4,
        "rollouts.generation.max_tokens": 24,
        "rollouts.engine.kv_gigabytes": 0.01,
        "reward.accel": "none",
        "optimization.steps": 1,
        "optimization.learning_rate": 1e-12,
        "optimization.batch_tokens": 2048,
        **settings,
    }
    with patch("threadweaver.train.rl.load_task", lambda name, **options: task or ByLength()):
        code = train("rl", options)
    metrics = base.parent / "run" / "metrics.jsonl"
    return None if code else json.loads(metrics.read_text().splitlines()[0])
