"""The roofline of the machine, measured in each run: a large matrix product a dtype, a large copy.

A roofline (Williams, Waterman and Patterson, 2009) bounds the time of a call from below: its
operations at the rate of the product, its bytes at the rate of the copy. A row's share is that
bound over its time. A share above 1 is possible: the copy moves everything through memory, while
the inputs of a small call lie in a cache.

Any dtype can be converted to float32 and multiplied there, so the rate of the product is at least
float32's, also where bfloat16 is emulated and slower.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from bench.meter import CpuMeter, CudaMeter
from tw_kernels.cpu import bfloat16_instructions

DTYPES = (torch.float32, torch.bfloat16)
REPEATS = 10
# Edge of the square matrices, and bytes that are copied: several times the last-level cache.
SIZES = {"cpu": (1536, 256 * 2**20), "cuda": (8192, 2**30)}
QUICK_SIZES = {"cpu": (512, 64 * 2**20), "cuda": (2048, 256 * 2**20)}
EMULATED_SIZE = 256  # edge for bfloat16 where the CPU emulates it, at 1 to 15 GFLOP/s


class Work(NamedTuple):
    """The work that one call needs, independent of the implementation; None if not counted.

    Attributes:
        flops: floating-point operations; a multiply-add is two.
        bytes: size of inputs and outputs, each once.
        dtype: of the operations, as in `dtype` columns.
    """

    flops: int | None = None
    bytes: int | None = None
    dtype: str = "float32"


def measure_roofline(meter: CpuMeter | CudaMeter, quick: bool) -> dict[str, Any]:
    """{"copy_gb_per_s": GB/s, read and written, "matmul_tflops": {dtype: TFLOP/s}} on the meter's
    device, with the current number of threads."""
    n, size = (QUICK_SIZES if quick else SIZES)[meter.device]
    rates = {}
    for dtype in DTYPES:
        if meter.device == "cpu" and dtype == torch.bfloat16 and not bfloat16_instructions():
            n = EMULATED_SIZE
        a, b = torch.randn(2, n, n, device=meter.device).to(dtype)
        out = torch.empty_like(a)
        seconds = _fastest(meter, lambda a=a, b=b, out=out: torch.mm(a, b, out=out))
        rates[str(dtype).removeprefix("torch.")] = 2 * n**3 / seconds / 1e12
    source, target = torch.zeros(2, size, dtype=torch.uint8, device=meter.device)
    seconds = _fastest(meter, lambda: target.copy_(source))
    return {"copy_gb_per_s": 2 * size / seconds / 1e9, "matmul_tflops": rates}


def _fastest(meter: CpuMeter | CudaMeter, call: Callable[[], Any]) -> float:
    """Fewest seconds of REPEATS calls after a warm-up."""
    call()
    return min(meter.seconds(call, 1) for _ in range(REPEATS))


def rates(work: Work, seconds: float, roofline: dict[str, Any]) -> dict[str, Any]:
    """A row's entries that follow from its work and time: flops, tflops, bytes, gb_per_s, the bound
    `floor_ms`, and its share of the time, `roofline`. Entries of what was not counted are missing.
    """
    row: dict[str, Any] = {}
    bounds = []
    if work.flops is not None:
        row |= {"flops": work.flops, "tflops": work.flops / seconds / 1e12}
        products = roofline["matmul_tflops"]
        bounds.append(row["tflops"] / max(products[work.dtype], products["float32"]))
    if work.bytes is not None:
        row |= {"bytes": work.bytes, "gb_per_s": work.bytes / seconds / 1e9}
        bounds.append(row["gb_per_s"] / roofline["copy_gb_per_s"])
    if bounds:
        row |= {"floor_ms": 1e3 * seconds * max(bounds), "roofline": max(bounds)}
    return row
