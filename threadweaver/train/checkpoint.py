"""Checkpoints that are whole or absent, and what a run needs beside the weights to continue.

`checkpoints/step-N/` is a plain Hugging Face folder and `trainer_state.pt`, or adapters and that
(lora.py), with a plain folder inside where one was asked for (report.export); of a run on several
ranks see also sharded_checkpoint.py. It is written under another name, forced to disk and renamed;
it is renamed again before it is deleted. So at any moment every folder named step-N is complete,
whichever process is killed whenever.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from threadweaver import ranks
from threadweaver.command import is_out_of_memory
from threadweaver.train.config import ConfigError, OptimizerName
from threadweaver.train.memory.optimizer import state_bytes
from threadweaver.whole_file import sync

STATE_FILE = "trainer_state.pt"
EXPORT = "merged"  # the plain folder in a checkpoint that is none itself


def plain_folder(checkpoint: Path) -> Path:
    """The plain Hugging Face folder of a checkpoint that has one."""
    export = checkpoint / EXPORT
    return export if export.is_dir() else checkpoint


def all_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    found = {path: re.fullmatch(r"step-([0-9]+)", path.name) for path in folder.glob("step-*")}
    return sorted((p for p, m in found.items() if m), key=lambda p: int(p.name[len("step-") :]))


def save_checkpoint(
    folder: Path,
    step: int,
    write: Callable[[Path], None],
    state: dict[str, Any],
    keep: int,
) -> None:
    """Writes folder/step-N and deletes all but the `keep` newest checkpoints; all ranks call it.

    Args:
        write: puts the model into a folder, on all ranks.
        state: what `load_state` is to give back; tensors, numbers, strings, and lists and
            dictionaries of those.

    Raises:
        OSError: it cannot be written, as on a full disk; nothing is left of it.
        RuntimeError: another rank has ended (`ranks.is_lost`).
        MemoryError, RuntimeError: there is too little memory (`is_out_of_memory`).
    """
    partial = folder / f".step-{step}.partial"

    def begin() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".step-*"):
            shutil.rmtree(leftover)
        partial.mkdir()

    def end() -> None:
        torch.save(state, partial / STATE_FILE)
        for path in (*partial.rglob("*"), partial):
            sync(path)

    try:
        ranks.on_first(begin)
        write(partial)
        ranks.wait_for_all()
        ranks.on_first(end)
    except Exception as error:
        # PyTorch and safetensors have errors of their own for a full disk.
        if ranks.is_first():
            shutil.rmtree(partial, ignore_errors=True)
        if ranks.is_lost(error) or is_out_of_memory(error):
            raise
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        done = all_checkpoints(folder)
        before = f"all up to {done[-1].name} is saved" if done else "nothing is saved yet"
        raise OSError(
            f"{folder / f'step-{step}'}: cannot be written ({_first_line(error)}; "
            f"{shutil.disk_usage(there).free / 1e9:,.1f} GB are free): {before}; make room and "
            "continue with --resume"
        ) from error

    def publish() -> None:
        partial.rename(folder / f"step-{step}")
        sync(folder)
        for old in all_checkpoints(folder)[:-keep]:
            shutil.rmtree(old.rename(folder / f".{old.name}.deleted"))

    ranks.on_first(publish)


def shapes_of(model: nn.Module) -> dict[str, list[int]]:
    """Of all parameters that are trained, by name."""
    return {name: list(p.shape) for name, p in model.named_parameters() if p.requires_grad}


def load_state(checkpoint: Path, *keys: str) -> dict[str, Any]:
    """What `save_checkpoint` was given as `state`, tensors on the CPU.

    Args:
        keys: names that it must have.

    Raises:
        ConfigError: the file is missing or damaged.
    """
    try:
        state = torch.load(checkpoint / STATE_FILE, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise TypeError("it holds no dictionary")
        if missing := [key for key in keys if key not in state]:
            raise KeyError(f"it has no {missing[0]}")
    except Exception as error:  # whatever damaged bytes make of the reader
        raise damaged_state(checkpoint, error) from error
    return state


def damaged_state(checkpoint: Path, error: Exception) -> ConfigError:
    """What to raise where the state of a checkpoint cannot be used."""
    return ConfigError(
        f"{checkpoint / STATE_FILE}: cannot be read ({_first_line(error)}); delete the folder "
        f"{checkpoint.name} to resume from the checkpoint before it"
    )


def check_room(
    folder: Path,
    model: nn.Module,
    optimizer: OptimizerName,
    count: int,
    models: int = 0,
    sharing: int = 1,
) -> None:
    """Raises ConfigError unless a folder has room for so many checkpoints more, what is trained and
    its moments, and so many plain models.

    Args:
        sharing: ranks that the moments are divided among.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    # Those that lie on the host are in the dtype of the parameters too.
    kind = "adamw" if optimizer == "adamw-offload" else optimizer
    moments, _ = state_bytes(kind, [tuple(p.shape) for p in trained], trained[0].dtype, sharing)
    size = sum(p.numel() * p.itemsize for p in trained) + sharing * moments
    whole = sum(p.numel() * p.itemsize for p in model.parameters())
    free = shutil.disk_usage(folder).free
    if count * size + models * whole > free:
        plain = f" and {models} plain models of {whole / 1e9:,.1f} GB" if models else ""
        raise ConfigError(
            f"run_dir: {folder} has {free / 1e9:,.1f} GB free, and {count} checkpoints of "
            f"{size / 1e9:,.1f} GB{plain} are to come: make room, name a folder elsewhere, or keep "
            "fewer (report.keep_checkpoints, report.checkpoint_every)"
        )


def check_shapes(checkpoint: Path, state: dict[str, Any], model: nn.Module) -> None:
    """Raises ConfigError unless the optimizer state of a checkpoint is that of this model."""
    shapes = shapes_of(model)
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
