"""Where a run is to be: the memory of a device, and what is computed on it."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from threadweaver.device import DTYPES, SHARE_KEPT_FREE, choose, memory_of
from threadweaver.train.config import ComputeConfig, ConfigError
from threadweaver.train.run_dir import device_of


@dataclass(frozen=True)
class Target:
    """One of the devices of a run, all of which hold as much.

    Attributes:
        device: "cpu" or "cuda".
        memory: bytes that it has.
        autocast: whether products are in bfloat16.
        parameters: dtype of what is trained.
        ranks: how many there are; of a host they share its memory.
    """

    device: str
    memory: int
    autocast: bool
    parameters: torch.dtype
    ranks: int = 1

    @property
    def usable(self) -> int:
        return int(self.memory * (1 - SHARE_KEPT_FREE))

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def products(self) -> torch.dtype:
        """In which matrices are multiplied; in it ranks gather parameters."""
        return torch.bfloat16 if self.autocast else torch.float32

    def shard(self, size: int) -> int:
        """What one rank holds of so much."""
        return -(-size // self.ranks)


def target_of(compute: ComputeConfig) -> Target:
    """Where a run computes. A GPU that is not here can be planned for if its memory is named, and
    is taken for one that multiplies bfloat16.

    Raises:
        ConfigError: the device is not here, and device_gb not set.
    """
    named = compute.device_gb
    absent = compute.device == "cuda" and not torch.cuda.is_available()
    if absent and named is None:
        raise ConfigError(
            "compute.device is cuda, and there is none here: name the memory of the one to plan "
            "for, as --compute.device_gb 80"
        )
    if absent:
        kind, autocast = "cuda", compute.precision != "fp32"
    else:
        device = device_of(compute)
        kind = device.type
        precision = choose(device).precision if compute.precision == "auto" else compute.precision
        autocast = precision == "bf16"
    ranks = compute.ranks or int(os.environ.get("WORLD_SIZE", "1"))
    if named is not None:
        memory = int(named * 1e9)
    else:
        here = compute.ranks or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        memory = memory_of(torch.device(kind)) // (here if kind == "cpu" else 1)
    parameters = DTYPES[compute.parameters]
    return Target(kind, memory, autocast or parameters == torch.bfloat16, parameters, ranks)
