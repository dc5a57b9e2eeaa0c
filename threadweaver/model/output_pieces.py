"""The output layer and the softmax over its logits, piece by piece of the tokens, on a GPU.

A piece's products are the only tensor of n x vocabulary that there is, in the dtype of the product;
its gradient overwrites them (tw_kernels/fused/log_softmax.py) and goes at once into that of the
hidden states and, summed in float32 and in place, into that of the weight. Where the loss is the
plain sum that happens in the forward pass, so a product is taken once; where each token has a
gradient of its own, known in the backward pass alone, products are taken again there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from threadweaver.model.float32_sums import add_product_
from threadweaver.model.logits import OutputLayer

if TYPE_CHECKING:
    from tw_kernels.fused.log_softmax import Statistics


def negative_log_likelihood(
    hidden: Tensor, head: OutputLayer, compute_weight: Tensor, targets: Tensor, rows: int
) -> Tensor:
    """Sum of -log p(target); a float32 scalar.

    Args:
        hidden: [n, hidden size], in the dtype of the products.
        compute_weight: head.weight in that dtype; the gradient goes to head.linear.weight.
        targets: int64 [n].
        rows: tokens of a piece.
    """
    layer = _Layer(head, compute_weight.detach(), targets, rows, torch.is_grad_enabled())
    return _Sum.apply(hidden, *_parameters(head), layer)


def logprobs_and_entropies(
    hidden: Tensor,
    head: OutputLayer,
    compute_weight: Tensor,
    targets: Tensor,
    rows: int,
    entropy_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """log p(target) and the entropy of each softmax, float32 [n]; arguments as above. Entropies
    have a gradient only if asked to."""
    layer = _Layer(head, compute_weight.detach(), targets, rows, torch.is_grad_enabled())
    return _Tokens.apply(hidden, *_parameters(head), layer, entropy_gradient)


def _parameters(head: OutputLayer) -> tuple[Tensor | None, ...]:
    """Weight, bias and trained rows, which `_Gradients.scaled` gives the gradients of."""
    trained = head.trained
    return head.linear.weight, head.linear.bias, None if trained is None else trained.rows


class _Layer(NamedTuple):
    """What both functions need besides the tensors that have gradients.

    Attributes:
        differentiates: whether gradients are wanted at all.
    """

    head: OutputLayer
    weight: Tensor
    targets: Tensor
    rows: int
    differentiates: bool

    @property
    def pieces(self) -> Iterator[slice]:
        for start in range(0, len(self.targets), self.rows):
            yield slice(start, start + self.rows)

    @property
    def transform(self):
        from tw_kernels.fused.log_softmax import Transform

        head = self.head
        num_ids = len(self.weight) if head.rows is None else head.rows
        return Transform(head.scale, head.softcap, num_ids, head.unknown)

    def products(self, hidden: Tensor) -> Tensor:
        bias, trained = self.head.bias, self.head.trained
        with torch.autocast(hidden.device.type, enabled=False):
            bias = None if bias is None else bias.to(hidden.dtype)
            products = F.linear(hidden, self.weight, bias)
            if trained is not None:
                trained.replace_products_(products, hidden)
            return products

    def statistics(self, products: Tensor, piece: slice) -> Statistics:
        from tw_kernels.fused.log_softmax import statistics

        return statistics(products, self.targets[piece], self.transform)


class _Gradients:
    """Sums over pieces of the gradients of hidden states [n, H], weight, bias and trained rows;
    None for those that need none."""

    def __init__(self, layer: _Layer, hidden: Tensor, needed: tuple[bool, ...]):
        linear = layer.head.linear
        self.layer = layer
        self.hidden = torch.empty_like(hidden) if needed[0] else None
        self.weight = self.bias = self.rows = None
        if needed[1]:
            self.weight = torch.zeros_like(linear.weight, dtype=torch.float32)
        if needed[2] and linear.bias is not None:
            self.bias = torch.zeros_like(linear.bias, dtype=torch.float32)
        self._trained = layer.head.trained
        if needed[3] and self._trained is not None:
            self.rows = torch.zeros_like(self._trained.rows)

    def add(
        self, piece: slice, hidden: Tensor, products: Tensor, found: Statistics, *douts: Tensor
    ) -> None:
        """Of one piece, whose products it overwrites.

        Args:
            hidden: of the piece.
            douts: gradients of its log-probabilities and, if they have any, of its entropies.
        """
        from tw_kernels.fused.log_softmax import gradient_

        layer = self.layer
        gradient_(products, layer.targets[piece], layer.transform, found, *douts)
        width = products.shape[1]
        with torch.autocast(hidden.device.type, enabled=False):
            dtrained = None
            if self._trained is not None:
                dtrained = products[:, self._trained.ids]
                products.index_fill_(1, self._trained.ids, 0)
                if self.rows is not None:
                    add_product_(self.rows, dtrained.t(), hidden)
            if self.hidden is not None:
                self.hidden[piece] = products @ layer.weight
                if dtrained is not None and self._trained is not None:
                    self.hidden[piece] += dtrained @ self._trained.rows.to(hidden.dtype)
            if self.weight is not None:
                add_product_(self.weight[:width], products.t(), hidden)
            if self.bias is not None:
                self.bias[:width] += products.sum(0, dtype=torch.float32)

    def scaled(self, factor: Tensor | None = None) -> tuple[Tensor | None, ...]:
        """All of them times a factor, in the dtypes of what they are of."""
        linear = self.layer.head.linear
        found = (self.hidden, self.weight, self.bias, self.rows)
        if factor is not None:
            for gradient in found:
                if gradient is not None:
                    gradient.mul_(factor)
        dtype = linear.weight.dtype
        return (found[0], *(None if g is None else g.to(dtype) for g in found[1:3]), self.rows)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, trained_rows, layer: _Layer):
        needed = ctx.needs_input_grad[:4] if layer.differentiates else (False,) * 4
        gradients = _Gradients(layer, hidden, needed)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        minus_one = -torch.ones(layer.rows, dtype=torch.float32, device=hidden.device)
        for piece in layer.pieces:
            h = hidden[piece]
            products = layer.products(h)
            found = layer.statistics(products, piece)
            total -= found.logprobs.sum()
            if any(needed):
                gradients.add(piece, h, products, found, minus_one)
        ctx.gradients = gradients
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, dtotal):  # pyright: ignore[reportIncompatibleMethodOverride]
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place, so good for once
        if gradients is None:
            raise RuntimeError("the loss is differentiable once: its gradient is computed with it")
        return *gradients.scaled(dtotal), None


class _Tokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, trained_rows, layer: _Layer, entropy_gradient: bool):
        found = [layer.statistics(layer.products(hidden[piece]), piece) for piece in layer.pieces]
        logprobs, entropies, _ = (torch.cat(parts) for parts in zip(*found, strict=True))
        ctx.layer, ctx.found, ctx.entropy_gradient = layer, found, entropy_gradient
        ctx.save_for_backward(hidden)
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogprobs, dentropies):  # pyright: ignore[reportIncompatibleMethodOverride]
        (hidden,) = ctx.saved_tensors
        gradients = _Gradients(ctx.layer, hidden, ctx.needs_input_grad[:4])
        douts = [dlogprobs, dentropies] if ctx.entropy_gradient else [dlogprobs]
        for piece, found in zip(ctx.layer.pieces, ctx.found, strict=True):
            h = hidden[piece]
            products = ctx.layer.products(h)
            gradients.add(piece, h, products, found, *(d.contiguous()[piece] for d in douts))
        return *gradients.scaled(), None, None
