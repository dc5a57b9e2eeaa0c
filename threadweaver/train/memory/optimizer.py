"""The bytes of an optimizer's state."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from threadweaver.train.config import OptimizerName
from threadweaver.train.moments import BLOCK, LEAST, is_quantised, shard_sizes

_CODES = 256 * 4  # the table of what a code of 8 bits stands for, float32


def state_bytes(
    optimizer: OptimizerName,
    shapes: Sequence[tuple[int, ...]],
    parameters: torch.dtype,
    ranks: int = 1,
) -> tuple[int, int]:
    """Bytes of the moments of parameters of these shapes, on the device and on the host.

    Offloaded, the host also has a copy of each parameter and of its gradient.

    Args:
        ranks: that share each of them.
    """
    item = parameters.itemsize
    elements = [shard_sizes(shape, ranks)[0] for shape in shapes]
    if optimizer == "adamw-8bit":
        pairs = zip(shapes, elements, strict=True)
        quantised = [n for shape, n in pairs if is_quantised(shape, ranks)]
        whole = sum(elements) - sum(quantised)
        coded = sum(n + n // BLOCK * 4 + _CODES for n in quantised)
        return 2 * (coded + whole * item), 0
    if optimizer == "adamw-offload":
        offloaded = sum(n for n in elements if n >= LEAST)
        return 2 * item * (sum(elements) - offloaded), 4 * item * offloaded
    return 2 * item * sum(elements), 0


def step_bytes(
    optimizer: OptimizerName,
    shapes: Sequence[tuple[int, ...]],
    parameters: torch.dtype,
    ranks: int = 1,
) -> int:
    """Most that a step takes on top of parameters, gradients and state: AdamW works in place;
    torchao's has float32 copies of the parameter that it works on and of its moments."""
    in_place = optimizer == "adamw-offload" or (
        optimizer == "adamw" and parameters == torch.float32
    )
    return 0 if in_place else 3 * 4 * max(shard_sizes(shape, ranks)[0] for shape in shapes)
