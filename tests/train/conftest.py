"""A run small enough for a test: a model of about 30,000 parameters on one-digit products."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
import yaml
from torch.distributed.utils import _to_kwargs

from tests.architecture import SMALL
from threadweaver.data import save_rows
from threadweaver.tasks.multiplication import make_rows, split_problems

if TYPE_CHECKING:
    from threadweaver.train.trainer import Trainer

ARCH = {**SMALL, "tie_word_embeddings": True}


@pytest.fixture(autouse=True)
def restore_torch_settings():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def data_files(tmp_path_factory) -> tuple[Path, Path]:
    """Files of 24 training and 6 validation rows, half of them parallel."""
    return save_products(tmp_path_factory.mktemp("data"), train=24, validation=6, digits=1)


@pytest.fixture
def eager():
    """torchao compiles a step for each shape of a parameter, which takes a minute; eagerly it
    computes the same."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def weights_of_resumed(run: Run) -> bytes:
    """Of a run of 6 steps, as if it had been killed after the fourth and gone on."""
    run.settings["report"]["checkpoint_every"] = 2
    assert run() == 0
    (run.folder / "summary.json").unlink()
    shutil.rmtree(run.folder / "checkpoints" / "step-6")
    assert run("--resume") == 0
    return run.weights()


def save_products(folder: Path, train: int, validation: int, digits: int) -> tuple[Path, Path]:
    """Writes files of so many products of two numbers, half of them parallel."""
    halves = split_problems(train=train, validation=validation, digits=digits, factors=2, seed=0)
    paths = folder / "train.jsonl", folder / "validation.jsonl"
    for path, problems in zip(paths, halves, strict=True):
        save_rows(list(make_rows(problems, parallel_share=0.5, seed=0)), path)
    return paths


class Run:
    """The settings of one run, and the command that makes it."""

    def __init__(self, command: str, folder: Path, **settings: dict):
        self.command, self.folder = command, folder
        self.settings = {
            "run_dir": str(folder),
            "model": {"arch": ARCH},
            "compute": {"device": "cpu", "precision": "fp32", "threads": 1},
            **settings,
        }

    def arguments(self, *extra: str) -> list[str]:
        path = self.folder.with_name(f"{self.folder.name}.yaml")
        path.write_text(yaml.safe_dump(self.settings))
        return [self.command, "--config", str(path), *extra]

    def __call__(self, *extra: str) -> int:
        """Runs in this process; returns the exit code."""
        # Not at the top: it exits where a package is missing, and GPU tests need it not.
        from threadweaver.train.__main__ import main

        return main(self.arguments(*extra))

    def dies_in_step(self, number: int, kind: type[Trainer], monkeypatch) -> None:
        """Runs until an interrupt in a step, counted from 1, before the step changes anything."""
        step = kind.train_step

        def die(trainer):
            if trainer.steps_done == number - 1:
                raise KeyboardInterrupt
            return step(trainer)

        with monkeypatch.context() as patch:
            patch.setattr(kind, "train_step", die)
            assert self() == 130

    def metrics(self) -> list[dict]:
        """All records, without what was measured with a clock."""
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in lines]

    def summary(self) -> dict:
        return json.loads((self.folder / "summary.json").read_text())

    def weights(self) -> bytes:
        """Of the finished run."""
        return (Path(self.summary()["checkpoint"]) / "model.safetensors").read_bytes()


@pytest.fixture
def new_run(tmp_path, data_files):
    """Makes a Run of SFT in a folder of that name."""
    train, validation = map(str, data_files)

    def make(name: str = "run") -> Run:
        return Run(
            "sft",
            tmp_path / name,
            data={"train": train, "validation": validation},
            optimization={
                "max_steps": 6,
                "batch_tokens": 512,
                "accumulation": 2,
                "learning_rate": 3e-3,
            },
            report={"validate_every": 3, "checkpoint_every": 2},
        )

    return make


@pytest.fixture
def gpus_of_fsdp(monkeypatch):
    """Fails if a pass has arguments that FSDP would move to a GPU; on a CPU it moves none."""
    from threadweaver.train.sharding import Passes

    forward = Passes.forward

    def checked(self, function, *args, **kwargs):
        (moved,), (named,) = _to_kwargs(args, kwargs, torch.device("meta"), False)
        assert all(a is b for a, b in zip(args, moved, strict=True)), "a tensor among them"
        assert all(named[name] is value for name, value in kwargs.items()), "a tensor among them"
        return forward(self, function, *args, **kwargs)

    monkeypatch.setattr(Passes, "forward", checked)


@pytest.fixture
def fails(capsys):
    """Checks that a run ends with this exit code and one line on stderr; returns the line."""

    def check(exit_code: int, code: int) -> str:
        error = capsys.readouterr().err
        assert exit_code == code, error
        assert error.startswith("error: ") and error.count("\n") == 1, error
        return error

    return check
