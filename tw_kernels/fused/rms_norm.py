"""RMSNorm, with or without a residual added first, and its gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from tw_kernels.fused.sizes import num_programs, num_warps
from tw_kernels.triton_device import launch

MOST_COLUMNS = 16384  # a row stays in the registers of one block of threads
_TILE = 2048  # elements a block works on at a time, or one row if that is more


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    offset: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (offset + weight) over the last dimension.

    Args:
        x: [..., H], H at most MOST_COLUMNS.
        weight: [H].
        out_dtype: of the result; default: that of x.
    """
    return _RMSNorm.apply(x, None, weight, eps, offset, out_dtype or x.dtype)[1]


def add_rms_norm(
    x: Tensor,
    delta: Tensor,
    weight: Tensor,
    eps: float,
    offset: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """x + delta, and its rms_norm; x and delta [..., H] may differ in dtype, and the sum has the
    wider one."""
    return _RMSNorm.apply(x, delta, weight, eps, offset, out_dtype or x.dtype)


class _RMSNorm(torch.autograd.Function):
    """-> (x + delta, or x itself if delta is None; the norm of it)"""

    @staticmethod
    def forward(ctx, x, delta, weight, eps, offset, out_dtype):
        x, weight = x.contiguous(), weight.contiguous()
        rows, cols = x.numel() // x.shape[-1], x.shape[-1]
        total = x
        if delta is not None:
            delta = delta.contiguous()
            total = torch.empty_like(x, dtype=torch.promote_types(x.dtype, delta.dtype))
        y = torch.empty_like(x, dtype=out_dtype)
        rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
        tile = _Tile(cols)
        launch(
            _forward_kernel,
            (tile.count(rows),),
            *(x, x if delta is None else delta, weight, total, y, rstd, rows, cols, eps, offset),
            ADD=delta is not None,
            **tile.constants,
        )
        ctx.save_for_backward(total, weight, rstd)
        ctx.offset, ctx.dtypes = offset, (x.dtype, None if delta is None else delta.dtype)
        ctx.set_materialize_grads(False)
        return (None if delta is None else total), y

    @staticmethod
    @once_differentiable
    def backward(ctx, dtotal, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        total, weight, rstd = ctx.saved_tensors
        x_dtype, delta_dtype = ctx.dtypes
        if dy is None:
            dx = None if dtotal is None else dtotal.to(x_dtype)
            return dx, None if dtotal is None else dtotal.to(delta_dtype), None, None, None, None
        rows, cols = total.numel() // total.shape[-1], total.shape[-1]
        tile = _Tile(cols)
        dy = dy.contiguous()
        dtotal = None if dtotal is None else dtotal.contiguous()
        dx = torch.empty_like(total, dtype=x_dtype)
        # One tensor is the gradient of both where they share a dtype.
        own_delta = delta_dtype not in (None, x_dtype)
        ddelta = torch.empty_like(total, dtype=delta_dtype) if own_delta else dx
        programs = num_programs(total.device, tile.count(rows))
        partial = torch.empty((programs, cols), dtype=torch.float32, device=total.device)
        launch(
            _backward_kernel,
            (programs,),
            *(dy, dy if dtotal is None else dtotal, total, rstd, weight, dx, ddelta, partial),
            *(rows, cols, ctx.offset),
            HAS_DTOTAL=dtotal is not None,
            OWN_DELTA=own_delta,
            **tile.constants,
        )
        dweight = partial.sum(0).to(weight.dtype) if ctx.needs_input_grad[2] else None
        return dx, None if delta_dtype is None else ddelta, dweight, None, None, None


class _Tile:
    """Rows and columns, powers of two, of what a program works on at a time."""

    def __init__(self, cols: int):
        self.cols = 1 << (cols - 1).bit_length()
        self.rows = max(1, _TILE // self.cols)

    def count(self, rows: int) -> int:
        return -(-rows // self.rows)

    @property
    def constants(self) -> dict[str, int]:
        warps = num_warps(self.rows * self.cols)
        return {"ROWS": self.rows, "COLS": self.cols, "num_warps": warps}


@triton.jit
def _forward_kernel(
    x, delta, weight, total, y, rstd, rows, cols, eps, offset,
    ADD: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    at = row[:, None].to(tl.int64) * cols + col[None, :]
    inside = (row[:, None] < rows) & (col[None, :] < cols)
    s = tl.load(x + at, inside, other=0).to(tl.float32)
    if ADD:
        s += tl.load(delta + at, inside, other=0).to(tl.float32)
        # The norm is that of the sum as the layers to come read it.
        s = s.to(total.dtype.element_ty)
        tl.store(total + at, s, inside)
        s = s.to(tl.float32)
    scale = tl.rsqrt(tl.sum(s * s, 1) / cols + eps)
    tl.store(rstd + row, scale, row < rows)
    w = tl.load(weight + col, col < cols, other=0).to(tl.float32) + offset
    normed = s * scale[:, None] * w[None, :]
    tl.store(y + at, normed.to(y.dtype.element_ty), inside)


@triton.jit
def _backward_kernel(
    dy, dtotal, total, rstd, weight, dx, ddelta, partial, rows, cols, offset,
    HAS_DTOTAL: tl.constexpr, OWN_DELTA: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Row tiles pid, pid + programs, ...: their dx, and their part of the weight's gradient."""
    pid, programs = tl.program_id(0), tl.num_programs(0)
    col = tl.arange(0, COLS)
    w = tl.load(weight + col, col < cols, other=0).to(tl.float32) + offset
    dweight = tl.zeros([COLS], tl.float32)
    for start in range(pid * ROWS, rows, programs * ROWS):
        row = start + tl.arange(0, ROWS)
        at = row[:, None].to(tl.int64) * cols + col[None, :]
        inside = (row[:, None] < rows) & (col[None, :] < cols)
        scale = tl.load(rstd + row, row < rows, other=0)[:, None]
        normed = tl.load(total + at, inside, other=0).to(tl.float32) * scale
        g = tl.load(dy + at, inside, other=0).to(tl.float32)
        dweight += tl.sum(g * normed, 0)
        g = g * w[None, :]
        g = scale * (g - normed * (tl.sum(g * normed, 1) / cols)[:, None])
        if HAS_DTOTAL:
            g += tl.load(dtotal + at, inside, other=0).to(tl.float32)
        tl.store(dx + at, g.to(dx.dtype.element_ty), inside)
        if OWN_DELTA:
            tl.store(ddelta + at, g.to(ddelta.dtype.element_ty), inside)
    tl.store(partial + pid * cols + col, dweight, col < cols)
