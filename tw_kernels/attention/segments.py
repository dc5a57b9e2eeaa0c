"""Trie attention out of library kernels, node by node and without a mask.

A node's tokens attend among themselves causally, and every later row of its subtree sees all of
them: one causal square and one full rectangle a node (docs/architecture.md, fact 4). Forward merges
the pieces of a row by log-sum-exp; backward runs each piece with the row's final (out, lse) and
sums.

No windows and no soft caps. A NaN or infinity can reach the earlier tokens of its own node too:
library kernels weigh what a causal mask hides with 0.
"""

import numpy as np
import torch
from torch import Tensor

from tw_kernels.attention import flash as aten_flash
from tw_kernels.trie import TrieLayout


def why_not(
    q: Tensor, k: Tensor, v: Tensor, window: int | None = None, softcap: float | None = None
) -> str | None:
    """None if this call can run, else the reason in one line."""
    if window is not None:
        return "library kernels have no window over the depth of a path"
    if softcap is not None:
        return "ATen's flash attention has no soft cap of the scores"
    return aten_flash.why_not(q)


def plan(layout: TrieLayout, q: Tensor, window: None = None) -> np.ndarray:
    """The node segments, int32 [M, 3]: start, end, subtree_end."""
    return layout.nodes


def _rows(x: Tensor, start: int, end: int) -> Tensor:
    """Rows [start, end) of [N, H, D] as a [1, H, rows, D] view."""
    return x[start:end].transpose(0, 1).unsqueeze(0)


def forward(
    q: Tensor, k: Tensor, v: Tensor, nodes: np.ndarray, scale: float, softcap: None = None
) -> tuple[Tensor, Tensor]:
    """out [N, Hq, D] in q's dtype; lse [Hq, N], float32, or float64 for float64."""
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty(q.shape, dtype=wide, device=q.device)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=wide, device=q.device)
    root_end = 0
    for start, end, subtree_end in nodes.tolist():
        # Preorder: when a node's turn comes, its rows hold the merge of all its ancestors, or
        # nothing yet if it has none.
        is_root = start == root_end
        root_end = subtree_end if is_root else root_end
        ks, vs = _rows(k, start, end), _rows(v, start, end)
        square = aten_flash.forward(_rows(q, start, end), ks, vs, scale, causal=True)
        _merge(out[start:end], lse[:, start:end], *square, first=is_root)
        if end < subtree_end:
            rectangle = aten_flash.forward(_rows(q, end, subtree_end), ks, vs, scale)
            _merge(out[end:subtree_end], lse[:, end:subtree_end], *rectangle, first=is_root)
    return out.to(q.dtype), lse


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, first: bool) -> None:
    """Adds one more piece of their softmax to rows: out [rows, H, D], part [1, H, rows, D]."""
    part, part_lse = part[0].transpose(0, 1), part_lse[0]
    if first:
        out.copy_(part)
        lse.copy_(part_lse)
        return
    # (out e^lse + part e^part_lse) / (e^lse + e^part_lse) is a lerp with a logistic weight.
    weight = torch.sigmoid(part_lse - lse).T.unsqueeze(-1)
    out.lerp_(part.to(out.dtype), weight)
    lse.copy_(torch.logaddexp(lse, part_lse))


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    nodes: np.ndarray,
    scale: float,
    softcap: None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq [N, Hq, D], dk and dv [N, Hkv, D] in the dtypes of q, k and v."""
    dq = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))

    def piece(ks: Tensor, vs: Tensor, start: int, end: int, causal: bool) -> tuple[Tensor, Tensor]:
        do, qs, o = (_rows(x, start, end) for x in (dout, q, out))
        rows_lse = lse[:, start:end].unsqueeze(0)
        rows_dq, part_dk, part_dv = aten_flash.backward(do, qs, ks, vs, o, rows_lse, scale, causal)
        dq[start:end] += rows_dq[0].transpose(0, 1)
        return part_dk, part_dv

    for start, end, subtree_end in nodes.tolist():
        ks, vs = _rows(k, start, end), _rows(v, start, end)
        node_dk, node_dv = piece(ks, vs, start, end, causal=True)
        if end < subtree_end:
            rest_dk, rest_dv = piece(ks, vs, end, subtree_end, causal=False)
            node_dk, node_dv = node_dk + rest_dk, node_dv + rest_dv
        _rows(dk, start, end).copy_(node_dk)
        _rows(dv, start, end).copy_(node_dv)
    return dq.to(q.dtype), dk, dv
