"""SFT, self-training and P-GRPO end to end on a tiny task, undisturbed and killed."""

from __future__ import annotations

import gc
import itertools
import json
import random
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from threadweaver.generate import Engine
from threadweaver.generate import load as load_module
from threadweaver.train import self_train, setup
from threadweaver.train.__main__ import main
from threadweaver.train.trainer import Trainer

from .easy_task import pipeline_settings, write_task


@pytest.fixture(scope="module")
def task_file(tmp_path_factory) -> Path:
    return write_task(tmp_path_factory.mktemp("task") / "seven.jsonl")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, task_file) -> tuple[Path, float]:
    """The folder of a pipeline that nobody disturbed, and the seconds it took."""
    folder = tmp_path_factory.mktemp("pipeline") / "whole"
    start = time.perf_counter()
    with nothing_held():
        assert main(arguments(folder, task_file)) == 0
    return folder, time.perf_counter() - start


@contextmanager
def nothing_held() -> Iterator[None]:
    """Fails if anything of what a model was loaded for is still there when the next one is loaded:
    the model, an engine or a trainer. The garbage collector does not run by itself."""
    there: weakref.WeakSet[Any] = weakref.WeakSet()
    make_engine, load_trainer = Engine.__init__, Trainer.load

    def make(engine, *arguments, **options):
        make_engine(engine, *arguments, **options)
        engine.itself = engine  # as its runner has itself with CUDA graphs
        there.add(engine)

    def load(trainer):
        load_trainer(trainer)
        there.add(trainer)

    def alone(load_model):
        def watched(*arguments, **options):
            assert [type(held).__name__ for held in there] == []
            found = load_model(*arguments, **options)
            there.add(found[0])
            return found

        return watched

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "__init__", make)
        patch.setattr(Trainer, "load", load)
        for owner, name in (
            (setup, "build_model"),
            (self_train, "build_model"),
            (load_module, "load_model"),
        ):
            patch.setattr(owner, name, alone(getattr(owner, name)))
        gc.collect()
        gc.disable()
        try:
            yield
        finally:
            gc.enable()


def arguments(folder: Path, task_file: Path, *options: str) -> list[str]:
    config = folder.with_name(f"{folder.name}.yaml")
    config.write_text(yaml.safe_dump(pipeline_settings(folder, task_file)))
    return ["pipeline", "--config", str(config), *options]


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def final_weights(folder: Path) -> bytes:
    return (Path(read(folder / "rl/summary.json")["checkpoint"]) / "model.safetensors").read_bytes()


def without_clock(stages: dict) -> dict:
    return {
        stage: {
            mode: {name: value for name, value in figures.items() if name != "detail"}
            for mode, figures in modes.items()
        }
        for stage, modes in stages.items()
    }


def test_a_pipeline_leaves_a_summary_of_its_stages_and_pictures(whole):
    folder, _ = whole
    summary = read(folder / "summary.json")
    assert list(summary["stages"]) == ["sft", "self_train", "rl"]
    for modes in summary["stages"].values():
        for mode in ("parallel", "sequential"):
            for name in ("accuracy", "format", "activation"):
                assert 0 <= modes[mode][name] <= 1
            assert 0 < modes[mode]["longest_path_tokens"] <= modes[mode]["total_tokens"]
    last = summary["stages"]["rl"]
    assert summary["speedup"] == pytest.approx(
        last["sequential"]["total_tokens"] / last["parallel"]["longest_path_tokens"]
    )
    assert last["parallel"]["accuracy"] > 0
    assert (folder / "stages.png").stat().st_size > 10_000
    assert (folder / "rl.png").stat().st_size > 10_000
    for stage in ("sft", "self_train/sft", "rl"):
        assert (folder / stage / "metrics.jsonl").exists()
    assert len((folder / "rl/metrics.jsonl").read_text().splitlines()) == 5


def test_a_finished_pipeline_run_again_changes_nothing(whole, task_file, capsys):
    folder, _ = whole
    before = final_weights(folder), read(folder / "summary.json")
    assert main(arguments(folder, task_file, "--resume")) == 0
    assert capsys.readouterr().out.count("this run is finished") == 3
    assert (final_weights(folder), read(folder / "summary.json")) == before


@pytest.mark.parametrize("kills", [2, pytest.param(6, marks=pytest.mark.slow)])
def test_a_pipeline_killed_at_random_times_ends_with_the_weights_of_one_that_was_not(
    whole, task_file, tmp_path, kills
):
    expected, seconds = whole
    folder = tmp_path / "killed"
    seed = 0 if kills == 2 else random.randrange(1000)
    print("seed", seed)
    rng = random.Random(seed)
    for kill in range(kills):
        resume = ["--resume"] if folder.exists() else []
        process = subprocess.Popen(
            [sys.executable, "-m", "threadweaver.train", *arguments(folder, task_file, *resume)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        # The settings are there once everything is imported and loaded.
        while not (folder / "config.yaml").exists() and process.poll() is None:
            time.sleep(0.02)
        if kill:
            time.sleep(10 * rng.random())  # it imports and loads anew, or is well under way
        time.sleep(rng.random() * seconds * 0.8)
        process.send_signal(signal.SIGKILL)
        output = process.communicate()[0]
        assert process.returncode in (0, -signal.SIGKILL), output
    assert main(arguments(folder, task_file, "--resume")) == 0
    assert final_weights(folder) == final_weights(expected)
    ours, theirs = (read(f / "summary.json")["stages"] for f in (folder, expected))
    assert without_clock(ours) == without_clock(theirs)


def test_the_same_seed_gives_the_same_table(whole, task_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("threadweaver.progress.monotonic", itertools.count(0, 0.5).__next__)
    folder = tmp_path / "again"
    assert main(arguments(folder, task_file)) == 0
    shown = capsys.readouterr().out  # whatever is said in between
    for mode in ("parallel", "sequential"):
        assert f"evaluating, {mode} mode: " in shown
    ours, theirs = (read(f / "summary.json")["stages"] for f in (folder, whole[0]))
    assert without_clock(ours) == without_clock(theirs)


def test_a_copied_pipeline_goes_on_with_its_own_files(whole, tmp_path, capsys):
    """From its own config.yaml, though the settings there name the folder that it was."""
    folder, _ = whole
    copy, gone = tmp_path / "a [copy]", folder.with_name("moved away")
    shutil.copytree(folder, copy)
    for name in ("rl/summary.json", "rl/checkpoints/step-5", "evaluation/rl.json", "rl/rl.png"):
        path = copy / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    folder.rename(gone)
    try:
        assert main(["pipeline", "--config", str(copy / "config.yaml"), "--resume"]) == 0
    finally:
        gone.rename(folder)
    assert f"resuming from {copy / 'rl/checkpoints/step-4'}" in capsys.readouterr().out
    assert final_weights(copy) == final_weights(folder)
    assert read(copy / "summary.json")["checkpoint"] == str(copy / "rl/checkpoints/step-5")
    assert yaml.safe_load((copy / "rl/config.yaml").read_text())["model"]["path"] == str(
        copy
        / "self_train/sft"
        / Path(read(folder / "self_train/summary.json")["checkpoint"]).relative_to(
            folder / "self_train/sft"
        )
    )


def test_a_pipeline_goes_on_with_its_data_in_another_place_and_with_no_other(
    whole, task_file, tmp_path, capsys
):
    folder, moved = tmp_path / "run", tmp_path / "moved" / "seven.jsonl"
    shutil.copytree(whole[0], folder)
    shutil.rmtree(folder / "rl")
    for path in (folder / "evaluation").glob("rl*"):
        path.unlink()
    moved.parent.mkdir()
    write_task(moved, count=42)
    assert main(arguments(folder, moved, "--resume")) == 2
    assert f"task: {moved} is not what {folder} was begun with" in capsys.readouterr().err
    moved.write_bytes(task_file.read_bytes())
    assert main(arguments(folder, moved, "--resume")) == 0
    assert final_weights(folder) == final_weights(whole[0])


def test_other_settings_are_refused_on_resume(whole, task_file, capsys):
    code = main(arguments(whole[0], task_file, "--resume", "--rl.optimization.steps", "9"))
    assert code == 2
    assert "rl.optimization.steps is 9, but" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("task.name", "multiplicaton", "did you mean 'multiplication'"),
        ("rl.rollouts.samples", "1", "rollouts.samples is 1: it must be at least 2"),
        ("rl.polcy.kl", "0", "did you mean 'rl.policy.kl'"),
        ("rl.policy.advantage", "median", "rl.policy.advantage"),
        ("evaluate.problems", "1000", "problems for validation"),
        ("sft.demonstration", "9", "did you mean 'sft.demonstrations'"),
        ("sft.parallel_share", "2", "must be between 0 and 1"),
        ("rl.rollouts.generation.sampling.temperature", "-1", "temperature is -1"),
        ("rl.reward.rho", ".nan", "rho is nan"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(
    task_file, tmp_path, capsys, option, value, message
):
    assert main(arguments(tmp_path / "run", task_file, f"--{option}", value)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "run").exists()


def test_a_run_that_could_not_begin_leaves_its_folder_free(task_file, tmp_path, capsys):
    folder = tmp_path / "run"
    config = arguments(folder, task_file, "--task.name", "multiplication", "--task.problems", "8")
    config += ["--task.options", "{}", "--sft.data", "null", "--sft.demonstrations"]
    demonstrations = []
    for count, seed, message in (
        ("9", "0", "sft.demonstrations is 9: there are 8"),
        ("8", "0", "model.arch"),
        ("8", "1", "model.arch"),
    ):
        options = [count, "--seed", seed, "--model.arch.model_type", "nonsense"]
        assert main([*config, *options]) == 2
        assert message in capsys.readouterr().err
        assert not (folder / "config.yaml").exists()
        if count == "8":
            demonstrations.append((folder / "data.jsonl").read_text())
    assert demonstrations[0] != demonstrations[1]
