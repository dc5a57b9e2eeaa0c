"""How far rounding may carry a gradient: relative to it or, where its terms cancel, to those."""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOAT32 = 2.0**-24  # unit roundoff
TENSOR_CORES = 2.0**-20  # of their sums: float32, low bits cut off instead of rounded


def gradient_terms(
    tensors: Sequence[Tensor], mask: Tensor, scale: float, softcap: float | None = None
) -> list[Tensor]:
    """dq, dk and dv of q, k, v and dout, each term by its absolute value: as if none cancelled.

    dS = P (dout v - delta), and delta is the row's mean of dout v. A token that sees itself alone
    has only that: its dq and dk are 0, but for how the two numbers were rounded. The slope of a
    soft cap, 1 - tanh^2, cancels too: it counts as 1.
    """
    q, k, v, dout = (x.detach().double() for x in tensors)
    group = q.shape[1] // k.shape[1]
    k_of, v_of = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k_of) * scale
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    p = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    dp = torch.einsum("ihd,jhd->hij", dout.abs(), v_of.abs())
    ds = p * (dp + (p * dp).sum(-1, keepdim=True))
    dq = torch.einsum("hij,jhd->ihd", ds, k_of.abs()) * scale
    dk = torch.einsum("hij,ihd->jhd", ds, q.abs()) * scale
    dv = torch.einsum("hij,ihd->jhd", p, dout.abs())
    return [dq, *(x.unflatten(1, (-1, group)).sum(2) for x in (dk, dv))]


def allowed(relative: float, want: Tensor, terms: Tensor, roundoff: float = FLOAT32) -> float:
    """The Frobenius norm that an error may have."""
    return max(relative * want.norm().item(), roundoff * terms.norm().item())
