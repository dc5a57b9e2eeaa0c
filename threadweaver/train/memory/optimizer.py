"""The bytes of an optimizer's state."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from threadweaver.train.config import OptimizerName

# torchao: what is smaller, or no whole number of blocks, is kept as it is.
_LEAST, _BLOCK = 4096, 256
_CODES = 256 * 4  # the table of what a code of 8 bits stands for, float32


def state_bytes(
    optimizer: OptimizerName, elements: Sequence[int], parameters: torch.dtype
) -> tuple[int, int]:
    """Bytes of the moments of parameters of so many elements, on the device and on the host.

    Offloaded, the host also has a copy of each parameter and of its gradient.
    """
    item = parameters.itemsize
    if optimizer == "adamw-8bit":
        quantised = [n for n in elements if n >= _LEAST and n % _BLOCK == 0]
        whole = sum(elements) - sum(quantised)
        coded = sum(n + n // _BLOCK * 4 + _CODES for n in quantised)
        return 2 * (coded + whole * item), 0
    if optimizer == "adamw-offload":
        offloaded = sum(n for n in elements if n >= _LEAST)
        return 2 * item * (sum(elements) - offloaded), 4 * item * offloaded
    return 2 * item * sum(elements), 0


def step_bytes(optimizer: OptimizerName, elements: Sequence[int], parameters: torch.dtype) -> int:
    """Most that a step takes on top of parameters, gradients and state: AdamW works in place;
    torchao's has float32 copies of the parameter that it works on and of its moments."""
    in_place = optimizer == "adamw-offload" or (
        optimizer == "adamw" and parameters == torch.float32
    )
    return 0 if in_place else 3 * 4 * max(elements)
