"""The most memory that tensors of one call hold, the same in every run."""

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_tensor_bytes(call: Callable[[], Any]) -> int:
    """The most bytes that torch's CPU allocator had given out at once during a call, less those it
    had before: from the profiler, which sees each allocation and release.

    The resident set (bench/meter.py) is no measure for a test: it depends on which free blocks
    malloc has kept.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        call()
    profiler: Any = run.profiler  # has no types
    events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
