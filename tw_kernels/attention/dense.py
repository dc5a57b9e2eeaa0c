"""Trie attention as masked attention, root by root: the plain definition, fastest for tiny tries.

Roots whose lengths share a power of two run as one padded batch, so the masks of a pack take
the sum over roots of at most 4 length^2, never N^2.

Windows and soft caps in every floating dtype. A NaN or infinity can reach all of its own root's
tokens, since those that do not see it weigh it with 0; it reaches no other root.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from tw_kernels.attention import flash as aten_flash
from tw_kernels.trie import TrieLayout


class Bucket(NamedTuple):
    """B roots, padded to a common length L.

    slots, int64 [B, L]: the token in each slot; padding repeats the root's first token.
    real, int64 [tokens]: which of the B * L slots are not padding.
    bias [B, 1, L, L] in q's dtype: 0 where visible, -inf elsewhere. Padding sees itself and nobody
        sees padding, so no row is empty and nothing of it reaches a real slot.
    """

    slots: Tensor
    real: Tensor
    bias: Tensor


def why_not(
    q: Tensor, k: Tensor, v: Tensor, window: int | None = None, softcap: float | None = None
) -> str | None:
    """None if this call can run, else the reason in one line."""
    return None if q.is_floating_point() else f"attention needs a floating dtype, not {q.dtype}"


def buckets(layout: TrieLayout) -> list[list[tuple[int, int]]]:
    """The roots, as (start, end), in groups that are padded to their longest."""
    groups: dict[int, list[tuple[int, int]]] = {}
    for start, end in layout.roots.tolist():
        groups.setdefault((end - start - 1).bit_length(), []).append((start, end))
    return list(groups.values())


def plan(layout: TrieLayout, q: Tensor, window: int | None = None) -> list[Bucket]:
    """All roots in buckets; the layout keeps them for q's dtype and the window."""
    key = "dense", q.dtype, window
    if key not in layout.memo:
        layout.memo[key] = [_bucket(layout, roots, q, window) for roots in buckets(layout)]
    return layout.memo[key]


def _bucket(
    layout: TrieLayout, roots: list[tuple[int, int]], q: Tensor, window: int | None
) -> Bucket:
    start, end = torch.tensor(roots, device=layout.device).T.unsqueeze(-1)
    at = torch.arange(int((end - start).max()), device=layout.device)
    is_real = start + at < end
    slots = torch.where(is_real, start + at, start)
    subtree_ends = torch.where(is_real, layout.subtree_ends[slots] - start, at + 1)
    visible = (at <= at[:, None]) & (at[:, None] < subtree_ends[:, None, :])
    if window is not None:
        starts = torch.where(is_real, layout.window_starts(window)[slots] - start, at)
        visible &= starts[:, :, None] <= at
    bias = torch.zeros(visible.shape, dtype=q.dtype, device=layout.device)
    bias.masked_fill_(~visible, -torch.inf)
    return Bucket(slots, is_real.flatten().nonzero().squeeze(-1), bias.unsqueeze(1))


def _to_slots(x: Tensor, slots: Tensor) -> Tensor:
    """[N, H, D] -> [B, H, L, D]; a view where the slots are the tokens themselves."""
    rows = x if slots.numel() == x.shape[0] else x[slots.flatten()]
    return rows.view(*slots.shape, *x.shape[1:]).transpose(1, 2)


def _from_slots(parts: list[Tensor], plan: list[Bucket], n: int) -> Tensor:
    """[B, H, L, D] for each bucket -> [N, H, D], contiguous."""
    rows = [part.transpose(1, 2).reshape(-1, part.shape[1], part.shape[3]) for part in parts]
    if len(rows) == 1 and rows[0].shape[0] == n:
        return rows[0].contiguous()
    into = torch.empty((n, *rows[0].shape[1:]), dtype=rows[0].dtype, device=rows[0].device)
    for values, (slots, real, _) in zip(rows, plan, strict=True):
        into[slots.flatten()[real]] = values[real]
    return into


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: list[Bucket],
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """out [N, Hq, D] in q's dtype; lse [Hq, N], float32, or float64 for float64."""
    attend = partial(_masked_forward, softcap=softcap)
    if q.device.type == "cpu" and softcap is None:
        attend = aten_flash.forward
    outs, lses = [], []
    for slots, _, bias in plan:
        qs, ks, vs = _to_slots(q, slots), _to_slots(k, slots), _to_slots(v, slots)
        out, lse = attend(qs, ks, vs, scale, bias=bias)
        outs.append(out)
        lses.append(lse.unsqueeze(-1))
    n = q.shape[0]
    return _from_slots(outs, plan, n), _from_slots(lses, plan, n).squeeze(-1).T.contiguous()


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: list[Bucket],
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq [N, Hq, D], dk and dv [N, Hkv, D] in the dtypes of q, k and v."""
    attend = partial(_masked_backward, softcap=softcap)
    if q.device.type == "cpu" and softcap is None:
        attend = aten_flash.backward
    lse = lse.T.unsqueeze(-1)
    grads = []
    for slots, _, bias in plan:
        do, qs, ks, vs, o = (_to_slots(x, slots) for x in (dout, q, k, v, out))
        rows_lse = _to_slots(lse, slots).squeeze(-1)
        grads.append(attend(do, qs, ks, vs, o, rows_lse, scale, bias=bias))
    dq, dk, dv = (_from_slots(list(g), plan, q.shape[0]) for g in zip(*grads, strict=True))
    return dq, dk, dv


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """[B, Hq, ...] -> [B, Hkv, Hq / Hkv, ...], in at least float32."""
    return x.unflatten(1, (kv_heads, -1)).to(torch.promote_types(x.dtype, torch.float32))


def _scores(q: Tensor, k: Tensor, scale: float, softcap: float | None) -> Tensor:
    scores = q * scale @ k.mT
    return scores if softcap is None else softcap * (scores / softcap).tanh()


def _masked_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """aten_flash.forward with a bias, written out, where ATen has none, and with a soft cap."""
    heads = k.shape[1]
    scores = _scores(_grouped(q, heads), _grouped(k, heads), scale, softcap) + bias.unsqueeze(2)
    lse = scores.logsumexp(-1)
    out = (scores - lse.unsqueeze(-1)).exp() @ _grouped(v, heads)
    return out.flatten(1, 2).to(q.dtype), lse.flatten(1, 2)


def _masked_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    bias: Tensor,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """aten_flash.backward with a bias, written out, and with a soft cap."""
    heads = k.shape[1]
    do, qg, kg, vg, o, lse = (_grouped(x, heads) for x in (dout, q, k, v, out, lse))
    scores = _scores(qg, kg, scale, softcap)
    p = (scores + bias.unsqueeze(2) - lse.unsqueeze(-1)).exp()
    dv = (p.mT @ do).sum(2)
    ds = p * (do @ vg.mT - (do * o).sum(-1, keepdim=True))
    if softcap is not None:
        ds = ds * (1 - (scores / softcap) ** 2)  # the derivative of tanh is 1 - tanh^2
    dq = ds @ kg * scale
    dk = (ds.mT @ qg).sum(2) * scale
    return dq.flatten(1, 2).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
