"""What both CUDA backends ask of a device, and where they run on it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tw_kernels import _C, cuda_build

Place = tuple[int, int, str]


def why_not(q: Tensor) -> str | None:
    """None if q lies on a GPU that the kernels are for, else the reason in one line."""
    if reason := _C.cuda_driver_missing():
        return reason
    if q.device.type != "cuda":
        return f"the CUDA kernels run on a Hopper GPU, not on {q.device.type}"
    if (capability := torch.cuda.get_device_capability(q.device)) != (9, 0):
        return (
            f"the CUDA kernels are for compute capability 9.0, not {capability[0]}.{capability[1]}"
        )
    return None


def why_not_built(*cubins: Path) -> str | None:
    """None if all of them are there, else which command builds them."""
    if all(cubin.exists() for cubin in cubins):
        return None
    return f"the CUDA kernels are not built: {cuda_build.COMMAND}"


def place(q: Tensor, cubin: Path) -> Place:
    """Device, current stream, and the file that holds the kernels."""
    return q.device.index, torch.cuda.current_stream(q.device).cuda_stream, str(cubin)
