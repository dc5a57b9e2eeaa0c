"""The rotary embedding of queries and keys, and its gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from tw_kernels.fused.sizes import num_warps
from tw_kernels.triton_device import launch


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """x cos + (-x2, x1) sin of each head x = (x1, x2), both halves of D / 2; for q and for k.

    Args:
        q, k: [N, Hq, D] and [N, Hkv, D], D even.
        cos, sin: [N, D], with no gradient.
        out_dtype: of the results; default: that of q.
    """
    return _Rotary.apply(q, k, cos, sin, out_dtype or q.dtype)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, out_dtype):
        ctx.save_for_backward(cos, sin)
        ctx.dtype = q.dtype
        return _rotate(q, k, cos, sin, out_dtype, backward=False)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk):  # pyright: ignore[reportIncompatibleMethodOverride]
        cos, sin = ctx.saved_tensors
        dq, dk = _rotate(dq, dk, cos, sin, ctx.dtype, backward=True)
        return dq, dk, None, None, None


def _rotate(q, k, cos, sin, out_dtype, backward):
    q, k, cos, sin = (x.contiguous() for x in (q, k, cos, sin))
    (n, q_heads, dim), k_heads = q.shape, k.shape[1]
    q_out, k_out = (torch.empty_like(x, dtype=out_dtype) for x in (q, k))
    half, q_block, k_block = (1 << (m - 1).bit_length() for m in (dim // 2, q_heads, k_heads))
    launch(
        _rotate_kernel,
        (n,),
        *(q, k, cos, sin, q_out, k_out, q_heads, k_heads, dim),
        BACKWARD=backward,
        Q_HEADS=q_block,
        K_HEADS=k_block,
        HALF=half,
        num_warps=num_warps(q_block * half),
    )
    return q_out, k_out


@triton.jit
def _rotate_heads(
    x, out, heads, dim, token, c1, c2, s1, s2, HEADS: tl.constexpr, HALF: tl.constexpr
):
    head, col = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    at = (token * heads + head) * dim + col
    inside = (head < heads) & (col < dim // 2)
    x1 = tl.load(x + at, inside, other=0).to(tl.float32)
    x2 = tl.load(x + at + dim // 2, inside, other=0).to(tl.float32)
    tl.store(out + at, (x1 * c1 - x2 * s1).to(out.dtype.element_ty), inside)
    tl.store(out + at + dim // 2, (x2 * c2 + x1 * s2).to(out.dtype.element_ty), inside)


@triton.jit
def _rotate_kernel(
    q, k, cos, sin, q_out, k_out, q_heads, k_heads, dim,
    BACKWARD: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """All heads of one token."""
    token = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, HALF)[None, :]
    at, inside = token * dim + col, col < dim // 2
    c1 = tl.load(cos + at, inside, other=0).to(tl.float32)
    c2 = tl.load(cos + at + dim // 2, inside, other=0).to(tl.float32)
    s1 = tl.load(sin + at, inside, other=0).to(tl.float32)
    s2 = tl.load(sin + at + dim // 2, inside, other=0).to(tl.float32)
    if BACKWARD:  # the transpose
        s1, s2 = -s2, -s1
    _rotate_heads(q, q_out, q_heads, dim, token, c1, c2, s1, s2, Q_HEADS, HALF)
    _rotate_heads(k, k_out, k_heads, dim, token, c1, c2, s1, s2, K_HEADS, HALF)
