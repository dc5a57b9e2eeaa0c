"""silu(gate) * up, and its gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from tw_kernels.fused.sizes import num_warps
from tw_kernels.triton_device import launch

_BLOCK = 2048


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of equal shapes and dtypes."""
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        _run(_forward_kernel, gate, up, out)
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):  # pyright: ignore[reportIncompatibleMethodOverride]
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        _run(_backward_kernel, dout.contiguous(), gate, up, dgate, dup)
        return dgate, dup


def _run(kernel, *tensors: Tensor) -> None:
    size = tensors[0].numel()
    grid = (-(-size // _BLOCK),)
    launch(kernel, grid, *tensors, size, BLOCK=_BLOCK, num_warps=num_warps(_BLOCK))


@triton.jit
def _forward_kernel(gate, up, out, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + at, at < size, other=0).to(tl.float32)
    u = tl.load(up + at, at < size, other=0).to(tl.float32)
    tl.store(out + at, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), at < size)


@triton.jit
def _backward_kernel(dout, gate, up, dgate, dup, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.load(dout + at, at < size, other=0).to(tl.float32)
    g = tl.load(gate + at, at < size, other=0).to(tl.float32)
    u = tl.load(up + at, at < size, other=0).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    # silu'(g) = sigmoid (1 + g (1 - sigmoid))
    slope = sigmoid * (1 + g * (1 - sigmoid))
    tl.store(dgate + at, (d * u * slope).to(dgate.dtype.element_ty), at < size)
    tl.store(dup + at, (d * g * sigmoid).to(dup.dtype.element_ty), at < size)
