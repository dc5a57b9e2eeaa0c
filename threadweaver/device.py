"""Where to compute and in which dtype: the meaning of the settings `device` and `precision`.

bf16    products in bfloat16
fp32    everything in float32
auto    bf16 where the device multiplies bfloat16 itself, else fp32
"""

from __future__ import annotations

import gc
import os
import sys
import time
from functools import cache
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple

import torch

from tw_kernels.cpu import bfloat16_instructions, processor_name

Precision = Literal["auto", "bf16", "fp32"]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FIRST_CAPABILITY = (8, 0)  # of CUDA devices that multiply bfloat16
# Of a device's memory, for what no tensor shows: libraries, their workspaces, and what an allocator
# rounds up or cannot use.
SHARE_KEPT_FREE = 0.05


class Choice(NamedTuple):
    """The precision that `auto` stands for, and the reason in one clause."""

    precision: Literal["bf16", "fp32"]
    reason: str


def find_device(name: str) -> torch.device:
    """The device of a setting: cpu, cuda, or auto, the GPU if there is one.

    Raises:
        ValueError: it is not here.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: no CUDA device here; use cpu or auto")
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(auto if name == "auto" else name)


def memory_of(device: torch.device) -> int:
    """Bytes that it has in all, used or not; of the host, what this process may take of them."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([physical, *_group_limits(Path("/"))])


def unused_memory(device: torch.device) -> int:
    """Bytes of a CUDA device that nobody holds, once PyTorch gave back what it keeps for later.

    What it then still keeps lies in pieces around tensors: no room for one large one.
    """
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return free


def give_back_memory() -> None:
    """To be called before a model is loaded, so that what nobody uses any more, of the one before
    it say, is no part of its device's memory.

    Layers that are recomputed or compiled and captured steps refer to themselves in a circle: only
    the garbage collector finds them, and it seldom runs.
    """
    gc.collect()
    torch.cuda.empty_cache()


def _group_limits(root: Path) -> list[int]:
    """Limits on the memory of this process by its control groups (cgroups 1 and 2): of its own
    group and of those above, as far as they are seen from here."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    limits = []
    for number, controllers, path in (line.split(":", 2) for line in lines):
        if number == "0":
            mount, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            mount, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        # A container may see its group as the mount itself.
        group = mount / path.strip("/")
        for folder in (group, *group.parents):
            if folder == mount.parent:
                break
            try:
                limits.append(int((folder / name).read_text()))
            except (OSError, ValueError):  # not there, or "max"
                continue
    return limits


def choose(device: torch.device) -> Choice:
    """The precision that `auto` stands for on a device."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        capability = torch.cuda.get_device_capability(device)
        if capability >= FIRST_CAPABILITY:
            return Choice("bf16", f"{name} multiplies bfloat16")
        version = ".".join(map(str, capability))
        return Choice("fp32", f"{name}, compute capability {version}, does not multiply bfloat16")
    if found := bfloat16_instructions():
        return Choice("bf16", f"{processor_name()} multiplies bfloat16 by {' and '.join(found)}")
    return Choice("fp32", f"{processor_name()} would have to emulate products of bfloat16")


def resolve(precision: Precision, device: torch.device) -> Literal["bf16", "fp32"]:
    """The precision to compute in. bf16 where it is emulated is allowed, with one warning."""
    if precision == "auto":
        return choose(device).precision
    if precision == "bf16" and choose(device).precision == "fp32":
        _warn(device.type)
    return precision


@cache
def _warn(device: str) -> None:
    reason = choose(torch.device(device)).reason
    print(
        f"warning: precision bf16: {reason}; a product takes {emulation_ratio(device):.1f} times "
        "as long as in float32: precision auto takes fp32 here",
        file=sys.stderr,
        flush=True,
    )


def emulation_ratio(device: str) -> float:
    """Time of a product of bfloat16 matrices over that of the same one in float32, measured."""
    times = {}
    for dtype in DTYPES.values():
        a, b = (torch.randn(256, 512, device=device).to(dtype) for _ in range(2))
        samples = []
        for _ in range(4):
            start = time.perf_counter()
            float((a @ b.T)[0, 0])  # waits for a GPU
            samples.append(time.perf_counter() - start)
        times[dtype] = median(samples[1:])
    return times[torch.bfloat16] / times[torch.float32]
