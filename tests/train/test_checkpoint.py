import os
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch

from threadweaver.model import build_tokenizer, new_model, save_model
from threadweaver.train import checkpoint as checkpoints
from threadweaver.train.checkpoint import (
    all_checkpoints,
    check_shapes,
    load_state,
    save_checkpoint,
    shapes_of,
)
from threadweaver.train.config import ConfigError

from .conftest import ARCH

TOKENIZER = build_tokenizer()
MODEL = new_model(TOKENIZER, ARCH, seed=0)


def write(folder):
    save_model(MODEL, TOKENIZER, folder)


def save(folder, step, keep=9, value=0, write=write):
    state = {"value": value, "shapes": shapes_of(MODEL)}
    save_checkpoint(folder, step, write, state, keep)
    return folder / f"step-{step}"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_checkpoints_stay_by_step_number(tmp_path):
    for step in (8, 9, 10, 11):
        save(tmp_path, step, keep=2)
    assert [p.name for p in all_checkpoints(tmp_path)] == ["step-10", "step-11"]
    assert names(tmp_path) == ["step-10", "step-11"]


def test_a_checkpoint_is_a_plain_hugging_face_folder(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = save(tmp_path, 1)
    model = AutoModelForCausalLM.from_pretrained(path)
    for name, parameter in MODEL.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))
    text = "<think>\n12</think>"
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert tokenizer.encode(text) == TOKENIZER.encode(text)


@pytest.mark.parametrize("dies_in", ["write", "sync"])
def test_a_write_that_dies_leaves_no_checkpoint_and_its_leftovers_go(
    tmp_path, monkeypatch, dies_in
):
    save(tmp_path, 1)

    def dying(whole):
        def write_and_die(*arguments):
            whole(*arguments)
            raise KeyboardInterrupt

        return write_and_die

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if dies_in == "sync":
            patch.setattr(checkpoints, "sync", dying(checkpoints.sync))
        save(tmp_path, 2, write=dying(write) if dies_in == "write" else write)
    assert [p.name for p in all_checkpoints(tmp_path)] == ["step-1"]
    assert names(tmp_path) == [".step-2.partial", "step-1"]
    save(tmp_path, 2, value=7)
    assert names(tmp_path) == ["step-1", "step-2"]
    assert load_state(tmp_path / "step-2")["value"] == 7


def test_a_folder_that_cannot_be_made_is_said_with_its_reason(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", full)
        with pytest.raises(OSError, match=r"new/step-3: cannot be written \(\[Errno 28\] No space"):
            save_checkpoint(tmp_path / "new", 3, lambda _: None, {}, keep=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_too_little_memory_is_not_taken_for_a_full_disk(tmp_path, error):
    with pytest.raises(type(error)) as raised:
        save(tmp_path, 1, write=MagicMock(side_effect=error))
    assert raised.value is error
    assert list(tmp_path.iterdir()) == []


def test_a_deletion_that_dies_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def die(path):
        (path / "config.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoints.shutil, "rmtree", die)
        save(tmp_path, 2, keep=1)
    assert [p.name for p in all_checkpoints(tmp_path)] == ["step-2"]
    save(tmp_path, 3)
    assert names(tmp_path) == ["step-2", "step-3"]


def test_every_file_is_on_disk_before_the_checkpoint_has_its_name(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(
        os, "fsync", lambda file: synced.append(str(Path(f"/proc/self/fd/{file}").readlink()))
    )
    path = save(tmp_path, 1)
    partial = tmp_path / ".step-1.partial"
    before = {str(partial / p.name) for p in path.iterdir()} | {str(partial)}
    assert before <= set(synced[:-1])
    assert synced[-1] == str(tmp_path)


def test_a_damaged_state_is_named_with_a_way_out(tmp_path):
    path = save(tmp_path, 1)
    state = path / "trainer_state.pt"
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(ConfigError, match=r"step-1/trainer_state\.pt: cannot be read.*delete"):
        load_state(path)
    state.unlink()
    with pytest.raises(ConfigError, match=r"step-1/trainer_state\.pt: cannot be read.*delete"):
        load_state(path)


def test_a_state_of_another_shape_names_the_parameter(tmp_path):
    path = save(tmp_path, 1)
    other = new_model(TOKENIZER, {**ARCH, "intermediate_size": 96}, seed=0)
    with pytest.raises(ConfigError, match=r"down_proj.*\[32, 64\] there and \[32, 96\]"):
        check_shapes(path, load_state(path), other)
    check_shapes(path, load_state(path), MODEL)
