"""What the Triton kernels ask of a device, and how they are launched on it.

Triton is imported only where a call could run: importing this module works without it. On a CPU the
kernels run in Triton's interpreter, which must be on (TRITON_INTERPRET=1) before anything imports
triton.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor

HEAD_DIMS = (16, 32, 64, 128, 256)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_CAPABILITY = (8, 0)  # bfloat16 in the tensor cores and asynchronous copies


@cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def why_not(q: Tensor) -> str | None:
    """None if the Triton kernels take q's device, dtype and head dim, else the reason."""
    if q.shape[-1] not in HEAD_DIMS:
        return f"head dim {q.shape[-1]} is not one of {', '.join(map(str, HEAD_DIMS))}"
    if q.dtype not in DTYPES:
        return f"{q.dtype} is not one of {', '.join(map(str, DTYPES))}"
    return why_no_triton(q.device)


def why_no_triton(device: torch.device) -> str | None:
    """None if Triton kernels run on a device, else the reason."""
    if not _is_installed():
        return "triton is not installed: pip install 'threadweaver[triton]'"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < MIN_CAPABILITY:
            return f"needs a GPU of compute capability 8.0 or later, not {capability}"
        return None
    from tw_kernels import triton_interpreter

    if device.type == "cpu" and triton_interpreter.is_on():
        return None
    return (
        f"needs a CUDA device, not {device.type}; "
        "on a CPU only with TRITON_INTERPRET=1 set before triton is imported"
    )


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Runs a kernel on the device of its first argument, a tensor; an empty grid runs nothing."""
    if all(grid):
        with torch.cuda.device_of(arguments[0]):
            kernel[grid](*arguments, **constants)
