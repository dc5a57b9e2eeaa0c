"""The folder of a run: whether one may start or continue in it, and its small files.

config.yaml      every setting, as resolved; present as soon as training starts
metrics.jsonl    one record a step (log.py)
summary.json     what came out; present once the run is finished
checkpoints/     step-N/ (checkpoint.py)
nan-step-N/      what a step that was not finite was made of (loop.py)
events.out.*     TensorBoard
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from threadweaver.train.checkpoint import all_checkpoints
from threadweaver.train.config import FREE_ON_RESUME, ConfigError, SFTConfig


def check_run_dir(run_dir: Path, resume: bool) -> None:
    """Raises ConfigError if there is nothing to resume, or something and no wish to resume it."""
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"run_dir: {run_dir} is a file; name a folder")
    if resume and not run_dir.exists():
        raise ConfigError(f"run_dir: {run_dir} does not exist; leave out --resume to start a run")
    holds_run = (run_dir / "config.yaml").exists() or all_checkpoints(run_dir / "checkpoints")
    if holds_run and not resume:
        raise ConfigError(
            f"run_dir: {run_dir} holds a run already; continue it with --resume or name another"
        )


def write_whole(path: Path, text: str) -> None:
    """The file appears with all of the text, on disk, or stays as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_config(config: SFTConfig) -> None:
    text = yaml.safe_dump(asdict(config), sort_keys=False)
    write_whole(Path(config.run_dir) / "config.yaml", text)


def resume_command(run_dir: Path) -> str:
    return f"python -m threadweaver.train sft --config {run_dir / 'config.yaml'} --resume"


def settings_of(config: SFTConfig) -> dict[str, Any]:
    """The settings that reach the weights, by dotted name."""
    return {
        name: value
        for name, value in _flatten(asdict(config), "")
        if not any(name == free or name.startswith(f"{free}.") for free in FREE_ON_RESUME)
    }


def _flatten(value: Any, name: str) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        inner = [_flatten(v, f"{name}.{k}" if name else k) for k, v in value.items()]
        return [pair for pairs in inner for pair in pairs]
    # As JSON reads them: a tuple of settings and the list it was saved as are the same.
    return [(name, json.loads(json.dumps(value)))]


def check_same_settings(config: SFTConfig, saved: dict[str, Any], checkpoint: Path) -> None:
    """Raises ConfigError if a checkpoint was made with other settings, naming the first."""
    ours = settings_of(config)
    for name in [*ours, *saved.keys() - ours.keys()]:
        if ours.get(name) != saved.get(name):
            raise ConfigError(
                f"{name} is {ours.get(name)}, but {checkpoint} was made with {saved.get(name)}; "
                "resume with the settings of the run or start another in a new run_dir"
            )
