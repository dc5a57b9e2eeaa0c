"""Time and peak memory of one call, on a CPU or on CUDA."""

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

SHORTEST_SAMPLE = 2e-3  # seconds; on a CPU a shorter call is repeated within one sample
FLUSH_BYTES = 256 * 2**20  # several times the L2 of any GPU


class CpuMeter:
    """Time by perf_counter, memory by the process's resident set.

    Peak memory is the high-water mark of the resident set during the call, less what was resident
    before it: it includes Python objects, C++ and torch, in steps of a page.
    """

    device = "cpu"

    def seconds(self, call: Callable[[], Any], calls: int) -> float:
        """Mean time of a call, over `calls` calls."""
        result = None
        start = perf_counter()
        for _ in range(calls):
            result = call()
        elapsed = perf_counter() - start
        del result
        return elapsed / calls

    def calls_in_sample(self, seconds: float) -> int:
        """The number of calls of so many seconds in one sample."""
        return max(1, round(SHORTEST_SAMPLE / max(seconds, 1e-7)))

    def peak_bytes(self, call: Callable[[], Any]) -> int | None:
        """Peak memory of one call; None where Linux's /proc is missing."""
        try:
            # New objects in free heap pages would not be counted, so these are returned first.
            if sys.platform == "linux":
                ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
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
    """Time by CUDA events around one call, after the L2 cache was filled with other data; memory by
    the caching allocator's statistics.

    The cache is filled by reading: of lines that were written, the timed call would pay the writing
    back, of 50 MB as long as a small decoding step takes.
    """

    device = "cuda"

    def __init__(self):
        self._other = torch.zeros(FLUSH_BYTES // 4, device=self.device)
        self._sum = torch.empty((), device=self.device)

    def seconds(self, call: Callable[[], Any], calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        elapsed = 0.0
        for _ in range(calls):
            torch.sum(self._other, 0, out=self._sum)
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
    """The meter of a device, "cpu" or "cuda"."""
    return CudaMeter() if device == "cuda" else CpuMeter()
