"""Weights and optimizer of a model that is divided among ranks, in a checkpoint.

    step-N/state/    torch.distributed.checkpoint: each rank wrote its part; any number reads it;
                     a moment of 8 bits is there as the plain tensors of it (moments.py)

The rest of the folder is that of one process (checkpoint.py), but that model.safetensors is there
only where the settings ask for it (report.export), and that trainer_state.pt has no optimizer.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from threadweaver import ranks
from threadweaver.command import is_out_of_memory
from threadweaver.train.config import ConfigError
from threadweaver.train.moments import has_codes, parts, room_for, take, without_codes
from threadweaver.train.shard_reader import SafeLoadPlanner, ShardReader
from threadweaver.train.sharding import scatter

FOLDER = "state"


def has_shards(checkpoint: Path) -> bool:
    return (checkpoint / FOLDER).is_dir()


def missing_shards(checkpoint: Path) -> ConfigError:
    """What to raise for a checkpoint of several ranks without its parts."""
    return _unreadable(checkpoint, "it is missing")


def save_shards(checkpoint: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Writes checkpoint/state, forced to disk; all ranks call it.

    Raises:
        OSError: on all ranks, if it cannot be written; but not for want of memory.
    """
    ours = _state_of(model, optimizer)
    moments = {
        name: {key: parts(value) if has_codes(value) else value for key, value in of.items()}
        for name, of in ours["state"].items()
    }
    state = {"model": _weights(model), "optimizer": {**ours, "state": moments}}
    try:
        save(state, storage_writer=FileSystemWriter(checkpoint / FOLDER))
    except CheckpointException as error:
        met = _met(error)
        raise met if is_out_of_memory(met) else OSError(_first_line(met)) from error


def load_weights(checkpoint: Path, model: nn.Module) -> None:
    """Reads them into the parameters that are there. In several processes all ranks call it.

    Raises:
        ConfigError: files are missing or damaged, or of another model.
    """
    _load(checkpoint, {"model": _weights(model)})


def load_optimizer(checkpoint: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """As `load_weights`, the state of an optimizer that has taken no step."""
    ours = _state_of(model, optimizer)
    with _reading(checkpoint) as reader:
        sizes: Any = reader.read_metadata().state_dict_metadata
        room = {
            name: {
                key: room_for(value, sizes.get(f"optimizer.state.{name}.{key}.scale"))
                for key, value in of.items()
            }
            for name, of in ours["state"].items()
        }
    _load(checkpoint, {"optimizer": {**ours, "state": room}})
    for name, of in ours["state"].items():
        for key, value in of.items():
            take(value, room[name][key])
    set_optimizer_state_dict(model, optimizer, ours)


def take_whole_optimizer(
    state: dict[str, Any] | None, model: nn.Module, optimizer: Optimizer
) -> None:
    """Divides the optimizer state of one process, as rank 0 read it from trainer_state.pt, among
    the ranks, which all call it with an optimizer that has taken no step."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    ours = _state_of(model, optimizer)
    # Numbers in a state dict count the parameters, group by group.
    ordered = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    theirs = {} if state is None else {ordered[i]: s for i, s in state["state"].items()}
    for name in ranks.from_first(list(theirs)):
        for key, value in ours["state"][name].items():
            _take_from_first(value, theirs.get(name, {}).get(key))
    set_optimizer_state_dict(model, optimizer, ours)


def _take_from_first(ours: Tensor, theirs: Any) -> None:
    """Fills a tensor of an optimizer's state from the whole one, which rank 0 has: else None."""
    if not isinstance(ours, DTensor):  # how many steps were taken, or what a code stands for
        ours.copy_(ranks.from_first(theirs))
    elif not has_codes(ours):
        scatter(ours, None if theirs is None else without_codes(theirs))
    elif ranks.from_first(has_codes(theirs)):
        of_first = {} if theirs is None else parts(theirs)
        for name, part in parts(ours).items():
            _take_from_first(part, of_first.get(name))
    else:
        room = room_for(ours, None)
        assert isinstance(room, Tensor)
        scatter(room, theirs)
        take(ours, room)


def _state_of(model: nn.Module, optimizer: Optimizer) -> Any:
    """An optimizer's state by the names of parameters. One that has taken no step gets the state of
    before its first: torch has it take one at a rate of 0, without gradients. That moves no
    parameter, but it is counted, and draws where parameters are rounded at random."""
    is_new = not optimizer.state
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        state: Any = get_optimizer_state_dict(model, optimizer)
    if is_new:
        for of in state["state"].values():
            of["step"].zero_()
    return state


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds of a model: its parameters, tied ones once, and stored buffers."""
    stored = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in stored}
    return {name: p.detach() for name, p in model.named_parameters()} | buffers


def _load(checkpoint: Path, state: dict[str, Any]) -> None:
    with _reading(checkpoint) as reader:
        reader.read_metadata()  # of what it cannot read, `load` would log a traceback
        with _no_word_of_one_process():
            load(state, storage_reader=reader, planner=SafeLoadPlanner())


@contextmanager
def _reading(checkpoint: Path) -> Iterator[ShardReader]:
    """Inside, whatever is wrong with the files is a ConfigError. Another rank that has ended is not
    (`ranks.is_lost`), nor too little memory of the device."""
    try:
        yield ShardReader(checkpoint / FOLDER)
    except (CheckpointException, Exception) as error:  # whatever damaged bytes make of the reader
        met = _met(error)
        if isinstance(met, torch.OutOfMemoryError):
            raise met from None  # of the device: the files may be sound
        if ranks.is_lost(error):
            raise
        raise _unreadable(checkpoint, _first_line(met)) from error


def _unreadable(checkpoint: Path, why: str) -> ConfigError:
    return ConfigError(
        f"{checkpoint / FOLDER}: cannot be read ({why}); delete the folder {checkpoint.name} to "
        "resume from the checkpoint before it"
    )


def _met(error: BaseException) -> BaseException:
    """What a rank met with, of what the ranks tell each other."""
    if not isinstance(error, CheckpointException):
        return error
    wrapped = next(iter(error.failures.values()))
    return wrapped[0] if isinstance(wrapped, tuple) else wrapped


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _no_word_of_one_process() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is")
        yield
