"""Log-probabilities and entropies of logits that are read once, and their gradient, which
overwrites the logits: no other tensor of their size is ever there.

What a model does to its products before the softmax is a part of both kernels:

    z = softcap * tanh(scale * x / softcap), and -infinity for ids without a token
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tw_kernels.triton_device import launch
from tw_kernels.triton_softcap import tanh

# Logits a block reads at a time, 16 a thread: as many as keep loads in flight, few enough that the
# registers hold them. Not timed yet.
_BLOCK, _WARPS = 4096, 8
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


class Transform(NamedTuple):
    """From products to logits z.

    Attributes:
        scale, softcap: as in the formula; softcap None: z = scale * x.
        rows: only so many products of a row count.
        unknown: bool [rows]; true where an id has no token.
    """

    scale: float
    softcap: float | None
    rows: int
    unknown: Tensor | None


class Statistics(NamedTuple):
    """Of the softmax of each row of logits; float32 [n].

    Attributes:
        logprobs: of the targets.
        entropies: in nats.
        lse: log-sum-exp.
    """

    logprobs: Tensor
    entropies: Tensor
    lse: Tensor


def statistics(products: Tensor, targets: Tensor, transform: Transform) -> Statistics:
    """Of products [n, at least transform.rows], row by row contiguous; targets int64 [n]."""
    n = len(targets)
    found = torch.empty(3, n, dtype=torch.float32, device=products.device)
    launch(
        _statistics_kernel,
        (n,),
        *(products, targets, *_of(transform, products), *found, products.stride(0)),
        **_constants(transform),
    )
    return Statistics(*found)


def gradient_(
    products: Tensor,
    targets: Tensor,
    transform: Transform,
    found: Statistics,
    dlogprobs: Tensor,
    dentropies: Tensor | None = None,
) -> Tensor:
    """Overwrites products with the gradient for them, and returns it.

    Args:
        products, targets, transform: as `statistics` had them.
        found: what it returned.
        dlogprobs, dentropies: float32 [n]; no dentropies: zeros.
    """
    launch(
        _gradient_kernel,
        (len(targets),),
        *(products, targets, *_of(transform, products), products.shape[1]),
        *(found.entropies, found.lse, dlogprobs),
        *(dlogprobs if dentropies is None else dentropies, products.stride(0)),
        HAS_DENTROPIES=dentropies is not None,
        **_constants(transform),
    )
    return products


def _of(transform: Transform, products: Tensor) -> tuple[Tensor, float, float, int]:
    unknown = products if transform.unknown is None else transform.unknown.view(torch.uint8)
    return unknown, transform.scale, transform.softcap or 1.0, transform.rows


def _constants(transform: Transform) -> dict[str, Any]:
    return {
        "SOFTCAP": transform.softcap is not None,
        "UNKNOWN": transform.unknown is not None,
        "BLOCK": _BLOCK,
        "num_warps": _WARPS,
    }


@triton.jit
def _transformed(
    x, col, unknown, scale, softcap, rows, SOFTCAP: tl.constexpr, UNKNOWN: tl.constexpr
):
    """z of products x, and which ids have a token; z is 0 where they have none."""
    known = col < rows
    if UNKNOWN:
        known = known & (tl.load(unknown + col, known, other=1) == 0)
    z = x.to(tl.float32) * scale
    if SOFTCAP:
        z = softcap * tanh(z / softcap)
    return tl.where(known, z, 0), known


@triton.jit
def _statistics_kernel(
    products, targets, unknown, scale, softcap, rows, logprobs, entropies, lses, stride,
    SOFTCAP: tl.constexpr, UNKNOWN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: running maximum m, sum of e^(z - m), and of z e^(z - m)."""
    i = tl.program_id(0)
    row = products + i.to(tl.int64) * stride
    target = tl.load(targets + i)
    target_z, has_token = _transformed(  # pyright: ignore[reportGeneralTypeIssues]
        tl.load(row + target), target, unknown, scale, softcap, rows, SOFTCAP, UNKNOWN
    )
    # An id without a token has a probability of 0, and a finite logarithm of it.
    at_target = tl.where(has_token, target_z, LOWEST)
    m, total, weighted = -float("inf"), 0.0, 0.0
    for start in range(0, rows, BLOCK):
        col = start + tl.arange(0, BLOCK)
        x = tl.load(row + col, col < rows, other=0)
        z, known = _transformed(  # pyright: ignore[reportGeneralTypeIssues]
            x, col, unknown, scale, softcap, rows, SOFTCAP, UNKNOWN
        )
        block_m = tl.max(tl.where(known, z, -float("inf")), 0)
        new_m = tl.maximum(m, block_m)
        # Of blocks without any known id there is nothing to add, and no maximum to scale by.
        base = tl.where(new_m == -float("inf"), 0.0, new_m)
        shrink = tl.exp(m - base)
        e = tl.where(known, tl.exp(z - base), 0)
        total = total * shrink + tl.sum(e, 0)
        weighted = weighted * shrink + tl.sum(e * z, 0)
        m = new_m
    lse = m + tl.log(total)
    tl.store(logprobs + i, at_target - lse)
    tl.store(entropies + i, lse - weighted / total)
    tl.store(lses + i, lse)


@triton.jit
def _gradient_kernel(
    products, targets, unknown, scale, softcap, rows, cols,
    entropies, lses, dlogprobs, dentropies, stride,
    HAS_DENTROPIES: tl.constexpr,
    SOFTCAP: tl.constexpr, UNKNOWN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: dz = dlogprob (1[target] - p) - dentropy p (log p + entropy)."""
    i = tl.program_id(0)
    row = products + i.to(tl.int64) * stride
    target, lse, dlogprob = tl.load(targets + i), tl.load(lses + i), tl.load(dlogprobs + i)
    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        x = tl.load(row + col, col < cols, other=0)
        z, known = _transformed(  # pyright: ignore[reportGeneralTypeIssues]
            x, col, unknown, scale, softcap, rows, SOFTCAP, UNKNOWN
        )
        p = tl.exp(z - lse)
        dz = dlogprob * (tl.where(col == target, 1.0, 0.0) - p)
        if HAS_DENTROPIES:
            dz -= tl.load(dentropies + i) * p * (z - lse + tl.load(entropies + i))
        dz *= scale
        if SOFTCAP:
            dz *= 1 - (z / softcap) * (z / softcap)
        dz = tl.where(known, dz, 0)
        tl.store(row + col, dz.to(products.dtype.element_ty), col < cols)
