"""The matrices of a model in the dtype of their products, cast once an optimizer step.

Autocast casts a matrix in every pass, once more where a layer is recomputed, and casts its gradient
back in every pass too. Here a linear layer multiplies by a copy that all passes of a step share,
and its product returns the gradient of the float32 matrix in float32, which is also what it is
summed in.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from threadweaver.model.float32_sums import product


class WeightCopies:
    """Copies of the float32 matrices of a model's linear layers.

    Args:
        model: its linear layers use the copies under autocast while there are any.
        dtype: of the copies; None: there are none, and the model stays as it is.
        compiled: its modules that run through torch.compile, which casts what is in them: as
            autocast does, but in one kernel with what else it does. They have no copies.
    """

    def __init__(
        self, model: nn.Module, dtype: torch.dtype | None, compiled: Iterable[nn.Module] = ()
    ):
        self._dtype = dtype
        self._layers: list[_CastLinear] = []
        left_alone = {module for layer in compiled for module in layer.modules()}
        for module in model.modules():
            if dtype is None or type(module) is not nn.Linear or module in left_alone:
                continue
            if module.weight.dtype == torch.float32:
                module.__class__ = _CastLinear
                module.register_buffer("cast_weight", None, persistent=False)
                self._layers.append(module)  # pyright: ignore[reportArgumentType] (it is one)

    @torch.no_grad()
    def cast(self) -> None:
        """Makes the copies, unless they are there: before the first pass with these weights."""
        for layer in self._layers:
            if layer.cast_weight is None:
                layer.cast_weight = layer.weight.to(self._dtype)

    def free(self) -> None:
        """Drops the copies: before the weights move, and where their memory is needed."""
        for layer in self._layers:
            layer.cast_weight = None


class _CastLinear(nn.Linear):
    """Attributes:
    cast_weight: copy of the weight; None: it multiplies as nn.Linear does.
    """

    cast_weight: Tensor | None

    def forward(self, input: Tensor) -> Any:
        if self.cast_weight is None or not torch.is_autocast_enabled(input.device.type):
            return F.linear(input, self.weight, self.bias)
        return _Product.apply(input, self.weight, self.bias, self.cast_weight)


class _Product(torch.autograd.Function):
    """x copy^T + bias, whose gradient is that of the weight instead of the copy."""

    @staticmethod
    def forward(ctx, x, weight, bias, copy):
        ctx.x_dtype = x.dtype
        x = x.to(copy.dtype)
        ctx.save_for_backward(x, copy)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, copy, None if bias is None else bias.to(copy.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, copy = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        rows = dy.reshape(-1, dy.shape[-1])
        dx = dweight = dbias = None
        if needs_x:
            dx = (dy @ copy).to(ctx.x_dtype)
        if needs_weight:
            dweight = product(rows.t(), x.reshape(-1, x.shape[-1]))
        if needs_bias:
            dbias = rows.sum(0, dtype=torch.float32)
        return dx, dweight, dbias, None
