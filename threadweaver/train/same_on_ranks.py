"""What must be the same on all ranks of a run, and what must not."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from threadweaver import ranks
from threadweaver.train.config import ConfigError, OptimizationConfig, RunConfig
from threadweaver.train.optimizer import optimizations
from threadweaver.train.run_dir import flatten

# For a file that rank 0 made to be seen on another machine.
SEEN_SECONDS = 10.0


def check_settings(config: RunConfig) -> None:
    """Raises ConfigError if ranks have other settings than rank 0, or settings that cannot be
    divided among them. All call it."""
    size = ranks.size()
    all_of_them = ranks.gather(dict(flatten(asdict(config))))
    for rank, theirs in enumerate(all_of_them):
        for name, value in all_of_them[0].items():
            if theirs.get(name) != value:
                raise ConfigError(
                    f"{name} is {theirs.get(name)} on rank {rank} and {value} on rank 0: start all "
                    "ranks with the same settings"
                )
    check_divisible(config, size)


def check_divisible(config: RunConfig, size: int) -> None:
    """Raises ConfigError if so many ranks cannot share out what the settings ask for."""
    for name, settings in optimizations(config):
        if isinstance(settings, OptimizationConfig) and settings.accumulation % size:
            raise ConfigError(
                f"{name}.accumulation is {settings.accumulation}, and there are {size} ranks: it "
                "counts the micro-batches that all ranks have in a step, so it must be a multiple "
                f"of {size}"
            )
        if settings.optimizer == "adamw-offload" and size > 1:
            raise ConfigError(
                f"{name}.optimizer is adamw-offload, which has not been tried on several ranks "
                f"(here {size}): use adamw or adamw-8bit"
            )


def check_folder(folder: Path) -> None:
    """Raises ConfigError if ranks have another folder of this name than rank 0, as on machines that
    do not share it, or cannot write there. All call it, with the folder there on rank 0."""
    if ranks.size() == 1:
        return

    def make() -> Path:
        mark = folder / f".ranks-{uuid4().hex}"
        mark.touch()
        return mark

    mark = ranks.on_first(make)
    is_seen = ranks.becomes(lambda: os.path.exists(mark), SEEN_SECONDS)  # noqa: PTH110 (never raises)
    found = ranks.gather((is_seen, os.access(folder, os.W_OK)))
    if ranks.is_first():
        mark.unlink()
    for rank, (is_seen, is_writable) in enumerate(found):
        if not is_seen:
            raise ConfigError(
                f"run_dir: {folder} is another folder on rank {rank} than on rank 0: name one that "
                "all machines share"
            )
        if not is_writable:
            raise ConfigError(f"run_dir: {folder} cannot be written on rank {rank}")


def check_data(name: str, fingerprint: str) -> None:
    """Raises ConfigError if ranks have other data than rank 0. All call it.

    Args:
        name: the setting that names the data, and its value.
    """
    all_of_them = ranks.gather(fingerprint)
    for rank, theirs in enumerate(all_of_them):
        if theirs != all_of_them[0]:
            raise ConfigError(
                f"{name} is not the same data on rank {rank} as on rank 0: copy it there again, or "
                "name a folder that all machines share"
            )


def generator_states() -> dict[str, Any]:
    """Of PyTorch's generators, from which dropout and stochastic rounding draw; each rank has its
    own. All call it."""
    states: dict[str, Any] = {"rng": torch.get_rng_state(), "cuda_rng": []}
    if torch.cuda.is_initialized():
        states["cuda_rng"] = [torch.cuda.get_rng_state()]
    return states if ranks.size() == 1 else {**states, "rank_rng": ranks.gather(states)}


def restore_generators(state: dict[str, Any], seed: int) -> None:
    """Sets them as they were, if there were as many ranks; else that of rank 0 alone, and the
    others by the seed, the step and the rank."""
    of_ranks = state.get("rank_rng", [state])
    rank, size = ranks.rank(), ranks.size()
    if len(of_ranks) == size:
        state = of_ranks[rank]
    elif rank > 0:
        torch.manual_seed(hash((seed, state["step"], rank)))
        return
    torch.set_rng_state(state["rng"])
    if torch.cuda.is_initialized() and state["cuda_rng"]:
        # Older versions saved those of all GPUs; a rank draws on one, then the first.
        torch.cuda.set_rng_state(state["cuda_rng"][0])
