"""The folder of a run: whether one may start or continue in it, and its small files.

config.yaml      every setting, as resolved; present as soon as training starts
metrics.jsonl    one record a step (log.py)
summary.json     what came out; present once the run is finished
checkpoints/     step-N/ (checkpoint.py)
base/            the model that adapters are for (lora.py)
nan-step-N/      what a step that was not finite was made of (not_finite.py)
events.out.*     TensorBoard
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace
from rich.console import Console

from threadweaver.data import is_data_path
from threadweaver.device import choose, find_device, resolve
from threadweaver.json_file import read_object
from threadweaver.lock import LOCK_FILE
from threadweaver.progress import print_line
from threadweaver.train.checkpoint import all_checkpoints
from threadweaver.train.config import ComputeConfig, ConfigError, RunConfig
from threadweaver.whole_file import write_whole

PRECISION_NOTE = "# compute.precision: "


def device_of(compute: ComputeConfig) -> torch.device:
    """Raises ConfigError if it is not here."""
    try:
        return find_device(compute.device)
    except ValueError as error:
        raise ConfigError(f"compute.{error}") from error


def check_run_dir(run_dir: Path, resume: bool) -> None:
    """Raises ConfigError if there is nothing to resume, or something and no wish to resume it."""
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"run_dir: {run_dir} is a file; name a folder")
    if resume and not run_dir.exists():
        raise ConfigError(f"run_dir: {run_dir} does not exist; leave out --resume to start a run")
    if holds_run(run_dir) and not resume:
        raise ConfigError(
            f"run_dir: {run_dir} holds a run already; continue it with --resume or name another"
        )


def holds_run(run_dir: Path) -> bool:
    """Whether a run was started in it."""
    return (run_dir / "config.yaml").exists() or bool(all_checkpoints(run_dir / "checkpoints"))


def has_begun(run_dir: Path) -> bool:
    """Whether it holds something that was computed with its settings."""
    made = ("checkpoints/step-*", "rollouts/chunk-*.json", "selection.json", "summary.json")
    return any(True for pattern in made for _ in run_dir.glob(pattern))


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """As `whole_file.write_whole`."""
    write_whole(path, json.dumps(value, indent=indent) + "\n")


def read_json(path: Path, *keys: str) -> dict[str, Any]:
    """The object that a run wrote to a file of its own.

    Args:
        keys: names that it must have.

    Raises:
        ConfigError: it is damaged; names it and says what to do.
    """
    try:
        return read_object(path, *keys)
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{path} is not what a run wrote ({reason}): delete it and resume the run, which makes "
            "it again"
        ) from error


def checkpoint_of(run_dir: Path) -> Path:
    """The plain Hugging Face folder that a finished run ended with, in its own folder wherever that
    is now."""
    summary = read_json(run_dir / "summary.json", "checkpoint")
    named = Path(summary["checkpoint"])
    inside = [named.name]  # of the folder "checkpoints"; an export is in the checkpoint
    while named.parent.name not in ("checkpoints", ""):
        named = named.parent
        inside.insert(0, named.name)
    return run_dir.joinpath("checkpoints", *inside)


def in_own_folder(settings: Namespace, config_file: Path) -> Namespace:
    """Settings of a config.yaml that a run wrote, for the run in the folder where it is now: that
    may be a copy, or have been moved."""
    folder = _absolute(config_file.parent)
    old = settings.run_dir
    if config_file.name != "config.yaml" or not _is_of_run(folder) or _absolute(old) == folder:
        return settings
    settings = settings.clone()
    settings.run_dir = str(folder)
    for name in ("model.path", "data.train"):
        if settings.get(name):
            settings[name] = relocated(settings[name], old, folder)
    return settings


def _absolute(path: str | Path) -> Path:
    """Without `..`, and with links as they are, as `path_in` has it."""
    return Path(os.path.abspath(path))  # noqa: PTH100 (Path.absolute keeps `..`)


def _is_of_run(folder: Path) -> bool:
    """Whether the config.yaml in a folder is one that a run wrote there."""
    is_there = (folder / "config.yaml").exists()
    return is_there and ((folder / LOCK_FILE).exists() or has_begun(folder))


def run_root(run_dir: Path) -> Path:
    """The folder, absolute, of the whole run of which this may be a stage."""
    root = _absolute(run_dir)
    while root.parent != root and _is_of_run(root.parent):
        root = root.parent
    return root


def path_in(path: str, root: Path) -> str | None:
    """A path relative to a folder that it lies in; None if it lies elsewhere."""
    relative = os.path.relpath(path, root)
    return None if relative.startswith(os.pardir) else relative


def relocated(path: str, old_run_dir: str, run_dir: Path) -> str:
    """A path in a run's folder, or in that of the whole run, as it is now that both were copied or
    moved; others as they are."""
    if Path(path).is_absolute() != Path(old_run_dir).is_absolute():
        return path  # a run makes its paths of run_dir
    root = run_root(run_dir)
    depth = len(_absolute(run_dir).parts) - len(root.parts)
    old_root = [Path(old_run_dir), *Path(old_run_dir).absolute().parents][depth]
    relative = path_in(path, old_root)
    return path if relative is None else str(root / relative)


def write_config(config: RunConfig, precision_note: str | None) -> None:
    """Writes config.yaml.

    Args:
        precision_note: why compute.precision is what it is, as `settle_precision` gave it.
    """
    # Through JSON: YAML would mark a tuple as one of Python's.
    text = yaml.safe_dump(json.loads(json.dumps(asdict(config))), sort_keys=False)
    note = f"{PRECISION_NOTE}{precision_note}\n" if precision_note else ""
    write_whole(Path(config.run_dir) / "config.yaml", note + text)


def settle_precision(config: RunConfig, console: Console) -> str | None:
    """Makes compute.precision `auto` what the run was started with, or else what suits the device,
    and says so.

    Returns:
        Why, for `write_config`; None if the settings name a precision themselves.
    """
    compute = config.compute
    device = device_of(compute)
    if compute.precision != "auto":
        resolve(compute.precision, device)
        return None
    path = Path(config.run_dir) / "config.yaml"
    if path.exists():
        precision, note = saved_config(path)["compute"]["precision"], None
        first_line = path.read_text(encoding="utf-8").partition("\n")[0]
        if first_line.startswith(PRECISION_NOTE):
            note = first_line.removeprefix(PRECISION_NOTE)
    else:
        precision, reason = choose(device)
        note = f"{precision}, since {reason}"
        print_line(console, f"compute.precision: {note}")
    config.compute = replace(compute, precision=resolve(precision, device))
    return note


def saved_config(path: Path) -> dict[str, Any]:
    """The settings in a run's config.yaml.

    Raises:
        ConfigError: it is damaged; names it and says what to do.
    """
    try:
        saved = yaml.safe_load(path.read_text(encoding="utf-8"))
        if saved["compute"]["precision"] in ("bf16", "fp32"):
            return saved
        reason = "compute.precision is neither bf16 nor fp32"
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
    except (KeyError, TypeError):
        reason = "it has no compute.precision"
    raise ConfigError(
        f"{path} is not what a run wrote ({reason}): delete it and give the run's settings to "
        "resume, or start another run"
    )


def settings_of(config: RunConfig, settings: dict[str, Any] | None = None) -> dict[str, Any]:
    """The settings that reach the weights, by dotted name.

    Args:
        settings: others of the same kind of run, instead of those of `config`.
    """
    flat = flatten(asdict(config) if settings is None else settings, "")
    return {name: value for name, value in flat if not is_free(name, config.free_on_resume)}


def is_free(name: str, free: Iterable[str]) -> bool:
    """Whether a setting is among these settings and sections."""
    return any(name == f or name.startswith(f"{f}.") for f in free)


def flatten(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """Dictionaries of dictionaries as one list, by dotted name, with values as JSON has them."""
    if isinstance(value, dict):
        inner = [flatten(v, f"{name}.{k}" if name else k) for k, v in value.items()]
        return [pair for pairs in inner for pair in pairs]
    # A tuple of settings and the list it was saved as are the same.
    return [(name, json.loads(json.dumps(value)))]


def check_same_config(config: RunConfig, unused: Sequence[str] = ()) -> None:
    """Raises ConfigError if run_dir holds a run of other settings, naming the first.

    Args:
        unused: settings and sections with which nothing has been made yet.
    """
    path = Path(config.run_dir) / "config.yaml"
    if path.exists():
        settings = settings_of(config, saved_config(path))
        check_same_settings(config, settings, path, unused)


def check_same_settings(
    config: RunConfig, saved: dict[str, Any], made: Path, unused: Sequence[str] = ()
) -> None:
    """Raises ConfigError if something was made with other settings, naming the first."""
    ours = settings_of(config)
    free = [*config.free_on_resume, *unused]
    for name in [*ours, *sorted(saved.keys() - ours.keys())]:
        theirs = saved[name] if name in saved else _default(config, name, saved)
        if ours.get(name) == theirs or is_free(name, free):
            continue
        if _is_same_place(config, name, theirs) or _are_data(name, ours.get(name), theirs):
            continue
        raise ConfigError(
            f"{name} is {ours.get(name)}, but {made} was made with {theirs}, and it reaches the "
            "weights: resume with the settings of the run or start another in a new run_dir (what "
            f"may change: {', '.join(free)})"
        )


def _is_same_place(config: RunConfig, name: str, theirs: Any) -> bool:
    """Whether both are paths that end alike, ours in the folder of this run: it was copied."""
    if name != "model.path" or not isinstance(theirs, str) or config.model.path is None:
        return False
    inside = path_in(config.model.path, run_root(Path(config.run_dir)))
    if inside is None:
        return False
    parts = Path(inside).parts
    return Path(theirs).parts[-len(parts) :] == parts


def _are_data(name: str, ours: Any, theirs: Any) -> bool:
    """Whether both are paths of data, whose content counts: runs compare it themselves."""
    if not (isinstance(ours, str) and isinstance(theirs, str)):
        return False
    # A folder that was moved is none any more.
    return name == "sft.data" or (
        name == "task.name" and is_data_path(ours) and (is_data_path(theirs) or "/" in theirs)
    )


def _default(config: RunConfig, name: str, saved: Collection[str]) -> Any:
    """Of a setting that an older version did not have; None if it has none, or if its section was
    left out of the saved settings."""
    *parents, leaf = name.split(".")
    owner: Any = config
    for i, parent in enumerate(parents, 1):
        if is_dataclass(owner) and _default_of(owner, parent) is None:
            section = ".".join(parents[:i])
            if not any(is_free(other, [section]) and other != section for other in saved):
                return None
        owner = getattr(owner, parent, None)
    made = _default_of(owner, leaf) if is_dataclass(owner) else MISSING
    return None if made is MISSING else json.loads(json.dumps(made))


def _default_of(owner: Any, name: str) -> Any:
    field = next(f for f in fields(owner) if f.name == name)
    return field.default if field.default_factory is MISSING else field.default_factory()
