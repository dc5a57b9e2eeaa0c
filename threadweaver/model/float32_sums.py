"""Products of half-precision matrices into float32, as tensor cores sum them."""

from __future__ import annotations

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32; a and b of one dtype."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


def add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b; total in float32, a and b of one dtype."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += a @ b  # a CPU's products round to the dtype of their operands
