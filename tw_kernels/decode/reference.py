"""trie_decode by gathering: every row's keys and values side by side, then a plain softmax.

The definition of the op and of what a plan's arrays mean: it reads them row by row and shares
nothing. Any device; in float64 if the inputs are, else in float32. What a row does not see has no
effect on it, NaN and infinity included.
"""

from __future__ import annotations

from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tw_kernels.decode.plan import DecodePlan, PagedKV
from tw_kernels.scores import NO_OPTIONS, ScoreOptions

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CAN_BE_CAPTURED = False  # it reads the plan, and whether values are finite, on the host


class Gather(NamedTuple):
    """Rows that get their keys from the same items, and those keys."""

    rows: Tensor  # int64 [R], in the caller's order
    keys: Tensor  # int64 [K], page * page_size + offset
    visible: Tensor  # bool [R, K]


def why_not(q: Tensor, kv: PagedKV, options: ScoreOptions = NO_OPTIONS) -> str | None:
    """None if this call can run, else the reason in one line."""
    return None if q.dtype in DTYPES else f"{q.dtype} is not one of {', '.join(map(str, DTYPES))}"


@torch.no_grad()
def forward(
    q: Tensor,
    kv: PagedKV,
    plan: DecodePlan,
    scale: float,
    new_k: Tensor | None,
    new_v: Tensor | None,
    options: ScoreOptions,
) -> Tensor:
    """out [Q, Hq, D]; writes new_k and new_v to their slots first."""
    if new_k is not None and new_v is not None:
        write(kv, plan, new_k, new_v)
    window, softcap, sinks = options
    memo_key = "reference", window
    if memo_key not in plan.memo:
        plan.memo[memo_key] = _gathers(plan, window)
    num_kv_heads = kv.k_pages.shape[2]
    group = q.shape[1] // num_kv_heads
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    for rows, keys, visible in plan.memo[memo_key]:
        where = keys // plan.page_size, keys % plan.page_size
        k, v = (pages[where].transpose(0, 1).to(wide) for pages in (kv.k_pages, kv.v_pages))
        # The grouped heads are more rows of the same keys: [Hkv, R * group, D].
        heads = q[rows].unflatten(1, (num_kv_heads, group)).transpose(0, 1).flatten(1, 2).to(wide)
        seen = visible.repeat_interleave(group, 0)
        scores = scale * heads @ k.mT
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~seen, -torch.inf)
        if sinks is not None:
            logits = sinks.view(num_kv_heads, 1, group).expand(-1, len(rows), -1).flatten(1)
            scores = torch.cat([scores, logits[:, :, None]], 2)
        weights = scores.softmax(2)[:, :, : len(keys)]
        mixed = _mix(weights, v, seen).unflatten(1, (-1, group)).transpose(0, 1)
        out[rows] = mixed.flatten(1, 2).to(q.dtype)
    return out


def _mix(weights: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """weights [H, R, K] @ v [H, K, D]; NaN and infinity reach no row that does not see them.

    seen: bool [R, K]. Weights of what is not seen are 0.
    """
    if v.isfinite().all():
        return weights @ v
    mixed = weights @ v.nan_to_num(0, 0, 0)
    for special in (torch.nan, torch.inf, -torch.inf):
        holds = v.isnan() if special != special else v == special
        reached = seen.to(v.dtype) @ holds.to(v.dtype) > 0
        mixed = mixed + torch.where(reached, special, 0.0)
    return mixed


def write(kv: PagedKV, plan: DecodePlan, new_k: Tensor, new_v: Tensor) -> None:
    """Puts the rows of new_k and new_v [Q, Hkv, D] in their slots."""
    real = plan.size.rows
    rows, slots = plan.rows[:real].long(), plan.slots[:real].long()
    where = slots // plan.page_size, slots % plan.page_size
    kv.k_pages[where] = new_k[rows]
    kv.v_pages[where] = new_v[rows]


def _gathers(plan: DecodePlan, window: int | None) -> list[Gather]:
    items = plan.items[: plan.size.items].cpu().numpy()
    pages, positions = plan.pages.cpu().numpy(), plan.positions.cpu().numpy()
    rows = plan.rows.cpu().numpy()
    merge_ptr, merge_slots = plan.merge_ptr.cpu().numpy(), plan.merge_slots.cpu().numpy()
    item_of_slot = np.empty(plan.size.slots, dtype=np.int32)
    for i, (_, _, _, first_row, end_row, first_slot) in enumerate(items):
        item_of_slot[first_slot : first_slot + end_row - first_row] = i
    items_of_row = [
        item_of_slot[merge_slots[merge_ptr[row] : merge_ptr[row + 1]]].tobytes()
        for row in range(plan.size.rows)
    ]

    gathers = []
    for own, members in groupby(range(plan.size.rows), items_of_row.__getitem__):
        group = list(members)
        keys, key_positions = [], []
        for first_page, num_keys, first_position, *_ in items[np.frombuffer(own, np.int32)]:
            offsets = np.arange(num_keys)
            page = pages[first_page + offsets // plan.page_size].astype(np.int64)
            keys.append(page * plan.page_size + offsets % plan.page_size)
            key_positions.append(first_position + offsets)
        at, own_positions = np.concatenate(key_positions), positions[group][:, None]
        visible = at <= own_positions
        if window is not None:
            visible &= at > own_positions - window
        seen = visible.any(0)  # by some row of the group: others are not gathered
        parts = rows[group].astype(np.int64), np.concatenate(keys)[seen], visible[:, seen]
        gathers.append(Gather(*(torch.from_numpy(x).to(plan.buffer.device) for x in parts)))
    return gathers
