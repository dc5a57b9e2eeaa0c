"""The float64 reference of trie attention and its gradients, and the error of a result against it.

From the definition by `subtree_ends` and `window_starts`, independent of the library's backends:
one chunk of rows at a time, over the columns that any of them sees, on the device of the inputs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 512  # rows

# Largest error, over rows, of a row of D numbers relative to its own norm or to the tensor's root
# mean square row norm, whichever is larger. In bfloat16 probabilities and outputs are rounded; a
# wrong column or head changes its row by a large part of its norm.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 6e-2}


class Reference(NamedTuple):
    """Results in float64, of the checked heads only."""

    heads: Tensor  # int64 [h], query heads
    kv_heads: Tensor  # int64 [g]
    out: Tensor  # [N, h, D]
    dq: Tensor  # [N, h, D]
    dk: Tensor  # [N, g, D]
    dv: Tensor  # [N, g, D]


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    subtree_ends: Tensor,
    kv_heads: list[int],
    window_starts: Tensor | None = None,
) -> Reference:
    """Outputs and gradients of q, dout [N, Hq, D] and k, v [N, Hkv, D], for the given KV heads and
    their query heads; under a window, of the columns from a row's `window_starts` on."""
    n, group = q.shape[0], q.shape[1] // k.shape[1]
    kv = torch.tensor(kv_heads, device=q.device)
    heads = (kv[:, None] * group + torch.arange(group, device=q.device)).flatten()
    # [g, group, N, D] for queries, [g, N, D] for keys
    qs, dos = (x[:, heads].double().transpose(0, 1).unflatten(0, (-1, group)) for x in (q, dout))
    ks, vs = (x[:, kv].double().transpose(0, 1) for x in (k, v))
    out, dq, dk, dv = (torch.zeros_like(x) for x in (qs, qs, ks, vs))
    scale, ends = q.shape[-1] ** -0.5, subtree_ends.long()
    for start in range(0, n, CHUNK):
        rows = torch.arange(start, min(start + CHUNK, n), device=q.device)
        columns = (ends[: rows[-1] + 1] > start).nonzero().squeeze(1)
        hidden = (columns > rows[:, None]) | (rows[:, None] >= ends[columns])
        if window_starts is not None:
            hidden |= columns < window_starts[rows, None]
        kc, vc = ks[:, None, columns], vs[:, None, columns]
        qr, dor = qs[:, :, rows], dos[:, :, rows]
        p = (qr @ kc.mT * scale).masked_fill(hidden, -torch.inf).softmax(-1)
        outr = p @ vc
        ds = p * (dor @ vc.mT - (dor * outr).sum(-1, keepdim=True)) * scale
        out[:, :, rows] = outr
        dq[:, :, rows] = ds @ kc
        dk[:, columns] += (ds.mT @ qr).sum(1)
        dv[:, columns] += (p.mT @ dor).sum(1)
    out, dq = (x.flatten(0, 1).transpose(0, 1) for x in (out, dq))
    return Reference(heads, kv, out, dq, dk.transpose(0, 1), dv.transpose(0, 1))


def worst_row(got: Tensor, expected: Tensor) -> float:
    """The error that TOLERANCE bounds, of tensors [N, H, D]; infinite if anything is not finite."""
    norms = expected.norm(dim=-1)
    floor = norms.square().mean().sqrt()
    errors = (got.double() - expected).norm(dim=-1) / norms.clamp(min=floor)
    return float(errors.nan_to_num(nan=torch.inf).max())
