"""Warps and programs that the kernels of this package run with. Not timed yet."""

from __future__ import annotations

import torch

_ELEMENTS_A_WARP = 512  # 16 a thread: float32 copies of a few operands fit the registers
_PROGRAMS_A_MULTIPROCESSOR = 4
_PROGRAMS_ON_CPU = 3  # in the interpreter, so that programs do share rows in tests


def num_warps(elements: int) -> int:
    """Of a program that holds so many elements, a power of two, at a time."""
    return max(1, min(16, elements // _ELEMENTS_A_WARP))


def num_programs(device: torch.device, most: int) -> int:
    """Of a kernel whose programs divide `most` pieces of work among them."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        count = _PROGRAMS_A_MULTIPROCESSOR * properties.multi_processor_count
    else:
        count = _PROGRAMS_ON_CPU
    return min(most, count)
