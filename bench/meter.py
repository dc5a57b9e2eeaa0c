"""Time and peak memory of one call, on a CPU or on CUDA."""

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

SHORTEST_SAMPLE = 2e-3  # seconds; a shorter call is repeated inside one sample, on a CPU
FLUSH_BYTES = 256 * 2**20  # several times the L2 of any GPU


class CpuMeter:
    """perf_counter, and the process's resident set.

    Peak memory is the high-water mark of the resident set over the call, less what was resident
    before it: it counts Python objects, C++ and torch alike, in steps of a page.
    """

    device = "cpu"

    def seconds(self, call: Callable[[], Any], calls: int) -> float:
        """Mean over `calls` calls."""
        result = None
        start = perf_counter()
        for _ in range(calls):
            result = call()
        elapsed = perf_counter() - start
        del result
        return elapsed / calls

    def calls_in_sample(self, seconds: float) -> int:
        return max(1, round(SHORTEST_SAMPLE / max(seconds, 1e-7)))

    def peak_bytes(self, call: Callable[[], Any]) -> int | None:
        """None where the system does not tell (it takes Linux's /proc)."""
        try:
            # Free heap pages would take new objects in unseen, so they go back first.
            if sys.platform == "linux":
                ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is
            before = _resident("VmRSS")
        except (OSError, AttributeError):
            return None
        result = call()
        peak = _resident("VmHWM") - before
        del result
        return max(peak, 0)


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


class CudaMeter:
    """CUDA events around one call, after the L2 cache was overwritten; the caching allocator."""

    device = "cuda"

    def __init__(self):
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def seconds(self, call: Callable[[], Any], calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        elapsed = 0.0
        for _ in range(calls):
            self._flush.zero_()
            start.record()
            result = call()
            end.record()
            end.synchronize()
            del result
            elapsed += start.elapsed_time(end) / 1e3
        return elapsed / calls

    def calls_in_sample(self, seconds: float) -> int:
        return 1

    def peak_bytes(self, call: Callable[[], Any]) -> int | None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before


def meter_for(device: str) -> CpuMeter | CudaMeter:
    return CudaMeter() if device == "cuda" else CpuMeter()
