"""Tensors that may be divided among processes."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def whole(value: Tensor) -> Tensor:
    """All of a tensor, without a gradient; if it is divided, all processes call it."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach()


def local(value: Tensor) -> Tensor:
    """The part of it that this process has."""
    return value.to_local() if isinstance(value, DTensor) else value
