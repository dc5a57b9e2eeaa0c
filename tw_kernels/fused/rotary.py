"""The rotary embedding of queries and keys, each with or without an RMS norm of its heads before
it, and its gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from tw_kernels.fused.sizes import num_programs, num_warps
from tw_kernels.triton_device import launch


class Norm(NamedTuple):
    """x / sqrt(mean(x^2) + eps) * (offset + weight) of each head x; weight [D]."""

    weight: Tensor
    eps: float
    offset: float = 0.0


def rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    out_dtype: torch.dtype | None = None,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
) -> tuple[Tensor, Tensor]:
    """x cos + (-x2, x1) sin of each head x = (x1, x2), both halves of D / 2; for q and for k.

    Args:
        q, k: [N, Hq, D] and [N, Hkv, D], D even.
        cos, sin: [N, D], with no gradient.
        out_dtype: of the results; default: that of q.
        q_norm, k_norm: x is the norm of a head; None: the head itself.
    """
    out_dtype = out_dtype or q.dtype
    if q_norm is None and k_norm is None:
        return _Rotary.apply(q, k, cos, sin, out_dtype)
    (q_weight, *q_scalars), (k_weight, *k_scalars) = q_norm or _NO_NORM, k_norm or _NO_NORM
    scalars = (q_scalars, k_scalars)
    return _NormedRotary.apply(q, k, q_weight, k_weight, cos, sin, out_dtype, scalars)


_NO_NORM = (None, None, None)  # arguments that are None are compiled away
_TILE = 512  # elements of each half of heads, 4 a thread: they take 128 registers or fewer


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, out_dtype):
        ctx.save_for_backward(cos, sin)
        ctx.dtype = q.dtype
        return _rotate(q, k, cos, sin, out_dtype, _NO_NORM, _NO_NORM)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk):  # pyright: ignore[reportIncompatibleMethodOverride]
        cos, sin = ctx.saved_tensors
        dq, dk = _rotate(dq, dk, cos, sin, ctx.dtype, _NO_NORM, _NO_NORM, backward=True)
        return dq, dk, None, None, None


class _NormedRotary(torch.autograd.Function):
    """scalars: eps and offset of the norm of q, and of that of k."""

    @staticmethod
    def forward(ctx, q, k, q_weight, k_weight, cos, sin, out_dtype, scalars):
        q, k = q.contiguous(), k.contiguous()
        q_weight, k_weight = (w if w is None else w.contiguous() for w in (q_weight, k_weight))
        ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin)
        ctx.scalars = scalars
        norms = ((q_weight, *scalars[0]), (k_weight, *scalars[1]))
        return _rotate(q, k, cos, sin, out_dtype, *norms)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, q_weight, k_weight, cos, sin = ctx.saved_tensors
        dq, dk, cos, sin = (x.contiguous() for x in (dq, dk, cos, sin))
        q_out, k_out = torch.empty_like(q), torch.empty_like(k)
        n, sizes = len(q), (q.shape[1], k.shape[1], q.shape[2])
        programs = num_programs(q.device, n)
        partial = torch.empty((programs, 2, q.shape[2]), dtype=torch.float32, device=q.device)
        launch(
            _gradient_kernel,
            (programs,),
            *(dq, dk, q, k, cos, sin, q_out, k_out, partial),
            *(q_weight, *ctx.scalars[0], k_weight, *ctx.scalars[1], n, *sizes),
            **_tiles(*sizes),
        )
        dweights = [
            dweight.to(weight.dtype) if is_needed else None
            for dweight, weight, is_needed in zip(
                partial.sum(0), (q_weight, k_weight), ctx.needs_input_grad[2:4], strict=True
            )
        ]
        return q_out, k_out, *dweights, None, None, None, None


def _rotate(q, k, cos, sin, out_dtype, q_norm, k_norm, backward=False):
    q, k, cos, sin = (x.contiguous() for x in (q, k, cos, sin))
    q_out, k_out = (torch.empty_like(x, dtype=out_dtype) for x in (q, k))
    sizes = (q.shape[1], k.shape[1], q.shape[2])
    launch(
        _rotate_kernel,
        (len(q),),
        *(q, k, cos, sin, q_out, k_out, *q_norm, *k_norm, *sizes),
        BACKWARD=backward,
        **_blocks(*sizes),
    )
    return q_out, k_out


def _blocks(q_heads: int, k_heads: int, dim: int) -> dict[str, int]:
    q_block, k_block, half = (1 << (m - 1).bit_length() for m in (q_heads, k_heads, dim // 2))
    warps = num_warps(q_block * half)
    return {"Q_HEADS": q_block, "K_HEADS": k_block, "HALF": half, "num_warps": warps}


def _tiles(q_heads: int, k_heads: int, dim: int) -> dict[str, int]:
    """Of the gradient, which holds more operands: no more heads at a time than fill `_TILE`."""
    blocks = _blocks(q_heads, k_heads, dim)
    for name in ("Q_HEADS", "K_HEADS"):
        blocks[name] = max(1, min(blocks[name], _TILE // blocks["HALF"]))
    warps = num_warps(4 * blocks["Q_HEADS"] * blocks["HALF"])
    return blocks | {"num_warps": warps}


@triton.jit
def _halves(x, at, dim, inside):
    """Both halves of rows of D, in float32; 0 where not inside."""
    x1 = tl.load(x + at, inside, other=0).to(tl.float32)
    x2 = tl.load(x + at + dim // 2, inside, other=0).to(tl.float32)
    return x1, x2


@triton.jit
def _normed(x1, x2, eps, dim, is_head):
    """x / sqrt(mean(x^2) + eps), and what x was multiplied by; 0 for rows that are no heads."""
    scale = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, 1) / dim + eps)
    scale = tl.where(is_head, scale[:, None], 0)
    return x1 * scale, x2 * scale, scale


@triton.jit
def _rotate_heads(
    x, out, weight, eps, offset, heads, dim, token, c1, c2, s1, s2,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    head, col = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    at = (token * heads + head) * dim + col
    inside = (head < heads) & (col < dim // 2)
    if weight is not None:
        w1, w2 = _halves(weight, col, dim, col < dim // 2)  # pyright: ignore[reportGeneralTypeIssues]
    x1, x2 = _halves(x, at, dim, inside)  # pyright: ignore[reportGeneralTypeIssues]
    if weight is not None:
        x1, x2, _ = _normed(x1, x2, eps, dim, head < heads)  # pyright: ignore[reportGeneralTypeIssues]
        x1, x2 = x1 * (w1 + offset), x2 * (w2 + offset)
    tl.store(out + at, (x1 * c1 - x2 * s1).to(out.dtype.element_ty), inside)
    tl.store(out + at + dim // 2, (x2 * c2 + x1 * s2).to(out.dtype.element_ty), inside)


@triton.jit
def _rotate_kernel(
    q, k, cos, sin, q_out, k_out,
    q_weight, q_eps, q_offset, k_weight, k_eps, k_offset, q_heads, k_heads, dim,
    BACKWARD: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """All heads of one token. BACKWARD: the gradient where there is no norm."""
    token = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, HALF)[None, :]
    at, inside = token * dim + col, col < dim // 2
    c1, c2 = _halves(cos, at, dim, inside)  # pyright: ignore[reportGeneralTypeIssues]
    s1, s2 = _halves(sin, at, dim, inside)  # pyright: ignore[reportGeneralTypeIssues]
    if BACKWARD:  # the transpose
        s1, s2 = -s2, -s1
    _rotate_heads(
        q, q_out, q_weight, q_eps, q_offset, q_heads, dim, token, c1, c2, s1, s2, Q_HEADS, HALF
    )
    _rotate_heads(
        k, k_out, k_weight, k_eps, k_offset, k_heads, dim, token, c1, c2, s1, s2, K_HEADS, HALF
    )


@triton.jit
def _gradient_of_heads(
    dx, x, out, weight, eps, offset, heads, dim, token, c1, c2, s1, s2, dw1, dw2,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Stores dx of the heads of a token; returns both halves of the weight's gradient, [HALF]."""
    col = tl.arange(0, HALF)[None, :]
    for start in range(0, heads, HEADS):
        head = start + tl.arange(0, HEADS)[:, None]
        at = (token * heads + head) * dim + col
        inside = (head < heads) & (col < dim // 2)
        if weight is not None:
            w1, w2 = _halves(weight, col, dim, col < dim // 2)  # pyright: ignore[reportGeneralTypeIssues]
        d1, d2 = _halves(dx, at, dim, inside)  # pyright: ignore[reportGeneralTypeIssues]
        g1, g2 = d1 * c1 + d2 * s2, d2 * c2 - d1 * s1
        if weight is not None:
            x1, x2 = _halves(x, at, dim, inside)  # pyright: ignore[reportGeneralTypeIssues]
            x1, x2, scale = _normed(x1, x2, eps, dim, head < heads)  # pyright: ignore[reportGeneralTypeIssues]
            dw1, dw2 = dw1 + tl.sum(g1 * x1, 0), dw2 + tl.sum(g2 * x2, 0)
            g1, g2 = g1 * (w1 + offset), g2 * (w2 + offset)
            mean = (tl.sum(g1 * x1 + g2 * x2, 1) / dim)[:, None]
            g1, g2 = scale * (g1 - x1 * mean), scale * (g2 - x2 * mean)
        tl.store(out + at, g1.to(out.dtype.element_ty), inside)
        tl.store(out + at + dim // 2, g2.to(out.dtype.element_ty), inside)
    return dw1, dw2


@triton.jit
def _gradient_kernel(
    dq, dk, q, k, cos, sin, q_out, k_out, partial,
    q_weight, q_eps, q_offset, k_weight, k_eps, k_offset, n, q_heads, k_heads, dim,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Tokens pid, pid + programs, ...: their dq and dk, their part of the weights' gradients."""
    pid, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    col = tl.arange(0, HALF)
    q1, q2 = tl.zeros([HALF], tl.float32), tl.zeros([HALF], tl.float32)
    k1, k2 = tl.zeros([HALF], tl.float32), tl.zeros([HALF], tl.float32)
    for token in range(pid, n, programs):
        at, inside = token * dim + col[None, :], col[None, :] < dim // 2
        c1, c2 = _halves(cos, at, dim, inside)  # pyright: ignore[reportGeneralTypeIssues]
        s1, s2 = _halves(sin, at, dim, inside)  # pyright: ignore[reportGeneralTypeIssues]
        q1, q2 = _gradient_of_heads(  # pyright: ignore[reportGeneralTypeIssues]
            dq, q, q_out, q_weight, q_eps, q_offset, q_heads, dim, token, c1, c2, s1, s2, q1, q2,
            Q_HEADS, HALF,
        )  # fmt: skip
        k1, k2 = _gradient_of_heads(  # pyright: ignore[reportGeneralTypeIssues]
            dk, k, k_out, k_weight, k_eps, k_offset, k_heads, dim, token, c1, c2, s1, s2, k1, k2,
            K_HEADS, HALF,
        )  # fmt: skip
    at, inside = partial + pid * 2 * dim + col, col < dim // 2
    tl.store(at, q1, inside)
    tl.store(at + dim // 2, q2, inside)
    tl.store(at + dim, k1, inside)
    tl.store(at + dim + dim // 2, k2, inside)
