"""A file of a run that is damaged, or a disk that is full: one line that names the file."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from threadweaver.train import sharded_checkpoint
from threadweaver.train.config import ConfigError
from threadweaver.train.log import MetricsLog
from threadweaver.train.run_dir import read_json
from threadweaver.train.sharded_checkpoint import load_optimizer, load_weights, save_shards

from .test_resume import stop_before, stopped  # noqa: F401 (a fixture)
from .test_self_train import run as self_training  # noqa: F401 (a fixture)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b"no archive"),
        lambda path: path.write_bytes(b""),
        lambda path: torch.save([1], path),
        lambda path: torch.save({"step": 6}, path),
        lambda path: torch.save({**torch.load(path), "optimizer": {"state": 3}}, path),
        lambda path: torch.save({**torch.load(path), "rng": torch.zeros(3)}, path),
    ],
)
def test_a_damaged_state_is_named_and_the_checkpoint_before_it_taken(
    stopped,  # noqa: F811
    fails,
    damage,
):
    damage(stopped.folder / "checkpoints/step-6/trainer_state.pt")
    line = fails(stopped("--resume"), 2)
    assert "step-6/trainer_state.pt" in line and "delete the folder step-6" in line


def test_a_checkpoint_of_several_ranks_without_its_parts_is_named(stopped, fails):  # noqa: F811
    checkpoint = stopped.folder / "checkpoints/step-6"
    state = torch.load(checkpoint / "trainer_state.pt")
    del state["optimizer"]
    torch.save(state, checkpoint / "trainer_state.pt")
    line = fails(stopped("--resume"), 2)
    assert "step-6/state: cannot be read (it is missing)" in line
    assert "delete the folder step-6" in line


@pytest.mark.parametrize("damaged", [".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("damage", [lambda p: os.truncate(p, 100), Path.unlink])
def test_damaged_parts_of_a_checkpoint_are_named_in_one_line(tmp_path, caplog, damaged, damage):
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    save_shards(tmp_path / "step-6", model, optimizer)
    load_weights(tmp_path / "step-6", model)
    caplog.clear()
    damage(tmp_path / "step-6/state" / damaged)
    words = rf"step-6/state: cannot be read \({damaged}: .*the folder step-6 "
    with pytest.raises(ConfigError, match=words):
        load_weights(tmp_path / "step-6", model)
    assert not [r for r in caplog.records if "NullHandler" not in r.name]  # what users see


class Attack:
    """Runs code where it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("of_value", [False, True], ids=["metadata", "value"])
def test_parts_of_a_checkpoint_run_no_code(tmp_path, monkeypatch, of_value):
    mark = tmp_path / "attacked"
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    if of_value:
        states: Any = get_optimizer_state_dict(model, optimizer)
        states["param_groups"][0]["betas"] = Attack(mark)
        with monkeypatch.context() as patch:
            patch.setattr(sharded_checkpoint, "get_optimizer_state_dict", lambda *_: states)
            save_shards(tmp_path / "step-6", model, optimizer)
        if mark.exists():  # by a copy that PyTorch made
            mark.rmdir()
    else:
        save_shards(tmp_path / "step-6", model, optimizer)
        (tmp_path / "step-6/state/.metadata").write_bytes(pickle.dumps(Attack(mark)))
    words = "__0_0.distcp: " if of_value else ".metadata: it names posix.mkdir"
    with pytest.raises(ConfigError, match=words):
        load_optimizer(tmp_path / "step-6", model, optimizer)
    assert not mark.exists()


@pytest.mark.parametrize(
    "text", [b"no record\n", b'{"loss": 1}\n', b"\xff\n", b"[" * 100_000 + b"\n"]
)
def test_damaged_metrics_are_named_and_the_run_goes_on_without_them(
    stopped,  # noqa: F811
    new_run,
    fails,
    text,
):
    path = stopped.folder / "metrics.jsonl"
    path.write_bytes(text + path.read_bytes())
    line = fails(stopped("--resume"), 2)
    assert f"{path}:1" in line and "delete the file" in line
    path.unlink()
    assert stopped("--resume") == 0
    assert stopped.summary()["train_loss"] > 0


def test_records_of_steps_to_be_redone_go_also_where_earlier_ones_were_deleted(tmp_path):
    log = MetricsLog(tmp_path, 4, last={"step": 4})
    assert log.last == {"step": 4}
    for step in (5, 6):
        log.write({"step": step})
    log.close()
    log = MetricsLog(tmp_path, 5)
    assert log.last == {"step": 5}
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 5}\n'


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("rollouts/chunk-0.json", "{"),
        ("rollouts/chunk-0.json", '{"problems": ""}'),
        ("rollouts/chunk-1.json", "[" * 100_000),
        ("selection.json", "null"),
        ("sft/summary.json", "\0"),
    ],
)
def test_a_damaged_file_of_self_training_is_made_again_once_deleted(
    self_training,  # noqa: F811
    monkeypatch,
    fails,
    capsys,
    file,
    text,
):
    run = self_training
    right = "threadweaver.tasks.data_file.DataFile.submit"
    monkeypatch.setattr(right, lambda *_: lambda: True)
    for module in ("evaluate.grade", "train.batches"):
        monkeypatch.setattr(f"threadweaver.{module}.violations", lambda *_: [])
    run.settings["rollouts"]["generation"] = {"max_tokens": 8, "mode": "sequential"}
    run.settings["rollouts"]["samples"] = 16  # one without a control token for each problem
    assert run() == 0
    weights = run.weights()
    path = run.folder / file
    (run.folder / "summary.json").unlink()
    if "chunk" in file:
        (run.folder / "selection.json").unlink()
    path.write_text(text)
    capsys.readouterr()
    line = fails(run("--resume"), 2)
    assert str(path) in line and "delete it" in line
    path.unlink()
    assert run("--resume") == 0
    assert run.weights() == weights


class FullDiskError(RuntimeError):
    """As PyTorch's own, which is no OSError."""


def test_a_checkpoint_that_does_not_fit_is_removed_and_the_run_goes_on_later(
    new_run, monkeypatch, fails
):
    whole, run = new_run("whole"), new_run()
    assert whole() == 0
    save = torch.save

    def save_until_full(state, path):
        if state["step"] == 4:
            path.write_bytes(b"a part")
            raise FullDiskError("PytorchStreamWriter failed writing file data/3: file write failed")
        save(state, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save_until_full)
        line = fails(run(), 1)
    assert "checkpoints/step-4: cannot be written (Pytorch" in line
    assert "all up to step-2 is saved" in line and "--resume" in line
    assert [p.name for p in (run.folder / "checkpoints").iterdir()] == ["step-2"]
    assert run("--resume") == 0
    assert run.metrics() == whole.metrics()
    assert run.weights() == whole.weights()


def test_a_summary_that_cannot_be_written_does_not_hide_what_came_out(new_run, monkeypatch, capsys):
    run = new_run()

    def full(path, value, indent=2):
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("threadweaver.train.sft.write_json", full)
        assert run() == 1
    shown = capsys.readouterr()
    assert "train loss" in shown.out
    assert shown.err.startswith(f"error: {run.folder}/summary.json: No space left on device")
    assert shown.err.count("\n") == 1
    assert run("--resume") == 0


def test_an_output_on_a_full_disk_does_not_end_a_run(new_run, monkeypatch):
    run = new_run()
    with monkeypatch.context() as patch, open("/dev/full", "w") as full:  # noqa: PTH123
        patch.setattr(sys, "stdout", full)
        assert run() == 0
    assert run.summary()["steps"] == 6


def test_too_little_memory_is_not_taken_for_a_damaged_checkpoint(tmp_path, monkeypatch):
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    save_shards(tmp_path, model, optimizer)
    fails = MagicMock(side_effect=torch.OutOfMemoryError("CUDA out of memory"))
    # The second within what PyTorch tells all ranks.
    for owner, name in ((sharded_checkpoint, "room_for"), (FileSystemReader, "read_data")):
        with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
            patch.setattr(owner, name, fails)
            load_optimizer(tmp_path, model, optimizer)


def test_too_little_memory_is_not_taken_for_a_full_disk(tmp_path, monkeypatch):
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    fails = MagicMock(side_effect=torch.OutOfMemoryError("CUDA out of memory"))
    monkeypatch.setattr(FileSystemWriter, "write_data", fails)
    with pytest.raises(torch.OutOfMemoryError):
        save_shards(tmp_path, model, optimizer)


def test_too_little_memory_for_the_moments_is_not_taken_for_a_damaged_state(
    stopped,  # noqa: F811
    monkeypatch,
    fails,
):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "load_state_dict", MagicMock(side_effect=error))
        line = fails(stopped("--resume"), 1)
    assert "out of memory when 2.00 GiB were asked for" in line and "delete" not in line
    assert stopped("--resume") == 0


def test_a_record_that_cannot_be_written_names_the_file(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log._file = Path("/dev/full").open("w", buffering=1)  # noqa: SIM115
    with pytest.raises(OSError, match="No space left") as error:
        log.write({"step": 1})
    assert error.value.filename == str(tmp_path / "metrics.jsonl")
    log.close()


def test_a_damaged_evaluation_of_a_pipeline_is_named(tmp_path):
    path = tmp_path / "rl.json"
    named = '["parallel", "sequential"]'
    for text in ("", "[]", "3", '{"parallel": {}}', named, '"parallel sequential"'):
        path.write_text(text)
        with pytest.raises(ConfigError, match=rf"{path} is not what a run wrote .*delete it"):
            read_json(path, "parallel", "sequential")
    path.write_text('{"parallel": {}, "sequential": {}}')
    assert read_json(path, "parallel", "sequential")["parallel"] == {}
