"""Checkpoints that are whole or absent, and what a run needs beside the weights to continue.

`checkpoints/step-N/` is a plain Hugging Face folder and `trainer_state.pt`. It is written under
another name, forced to disk and renamed; it is renamed again before it is deleted. So at any moment
every folder named step-N is complete, whenever the process is killed.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from threadweaver.model import save_model
from threadweaver.train.config import ConfigError

STATE_FILE = "trainer_state.pt"


def all_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    found = {path: re.fullmatch(r"step-([0-9]+)", path.name) for path in folder.glob("step-*")}
    return sorted((p for p, m in found.items() if m), key=lambda p: int(p.name[len("step-") :]))


def save_checkpoint(
    folder: Path,
    step: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Writes folder/step-N and deletes all but the `keep` newest checkpoints.

    Args:
        state: what `load_state` is to give back; tensors, numbers, strings, and lists and
            dictionaries of those.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover)
    partial = folder / f".step-{step}.partial"
    save_model(model, tokenizer, partial)
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    torch.save({**state, "shapes": shapes}, partial / STATE_FILE)
    for path in (*partial.rglob("*"), partial):
        _sync(path)
    target = partial.rename(folder / f"step-{step}")
    _sync(folder)
    for old in all_checkpoints(folder)[:-keep]:
        shutil.rmtree(old.rename(folder / f".{old.name}.deleted"))
    return target


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def load_state(checkpoint: Path) -> dict[str, Any]:
    """What `save_checkpoint` was given as `state`, tensors on the CPU.

    Raises:
        ConfigError: the file is missing or damaged.
    """
    path = checkpoint / STATE_FILE
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({_first_line(error)}); delete the folder {checkpoint.name} "
            "to resume from the checkpoint before it"
        ) from error


def check_shapes(checkpoint: Path, state: dict[str, Any], model: nn.Module) -> None:
    """Raises ConfigError unless the optimizer state of a checkpoint is that of this model."""
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    for name in sorted(shapes.keys() | state["shapes"].keys()):
        ours, theirs = shapes.get(name), state["shapes"].get(name)
        if ours != theirs:
            raise ConfigError(
                f"{checkpoint / STATE_FILE}: made for another model: {name} has shape {theirs} "
                f"there and {ours} in the model; delete the folder {checkpoint.name} to resume "
                "from the checkpoint before it"
            )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
