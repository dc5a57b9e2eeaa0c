"""The Triton kernels of trie_decode: write, partial, merge.

partial runs one program per item, KV head and tile of matrix rows. The matrix rows of an item are
its query rows times the query heads that share the KV head, so that one fetch of a tile of keys
feeds them all; it leaves a normalised output and a base-2 log-sum-exp per slot. Where a plan has
room for items of more than 64 matrix rows it is launched twice: for these, with tiles of 128 rows,
and for the others, with tiles that let two programs share a multiprocessor. merge weighs the
slots of each row, in the plan's order, so the result does not depend on scheduling.

`window`, `softcap` and `sinks` are None where there is none: the compiler then drops the argument
with all that asks for it.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from tw_kernels.decode.plan import DecodePlan, PagedKV
from tw_kernels.decode.triton_tiles import launches_for, matrix_rows
from tw_kernels.scores import ScoreOptions
from tw_kernels.triton_device import launch
from tw_kernels.triton_softcap import tanh

LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def write_kernel(
    new_k, new_v, k_pages, v_pages, rows, slots, stride_kn, stride_kh, stride_vn, stride_vh,
    stride_page, stride_slot, stride_head, PAGE: tl.constexpr, H: tl.constexpr,
    BLOCK_H: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One program per row: its new key and value, all heads, to their slot."""
    slot = tl.load(slots + tl.program_id(0))
    if slot < 0:
        return
    row = tl.load(rows + tl.program_id(0)).to(tl.int64)
    heads = tl.arange(0, BLOCK_H)[:, None]
    dims = tl.arange(0, D)[None, :]
    inside = heads < H
    to = (slot // PAGE).to(tl.int64) * stride_page + slot % PAGE * stride_slot
    to += heads * stride_head + dims
    k = tl.load(new_k + row * stride_kn + heads * stride_kh + dims, mask=inside)
    v = tl.load(new_v + row * stride_vn + heads * stride_vh + dims, mask=inside)
    tl.store(k_pages + to, k, mask=inside)
    tl.store(v_pages + to, v, mask=inside)


def write(kv: PagedKV, plan: DecodePlan, new_k: Tensor, new_v: Tensor) -> None:
    """Puts the rows of new_k and new_v [Q, Hkv, D], last dimension contiguous, in their slots."""
    _, page_size, num_kv_heads, head_dim = kv.k_pages.shape
    launch(
        write_kernel, (plan.capacity.rows,),
        new_k, new_v, kv.k_pages, kv.v_pages, plan.rows, plan.slots,
        *new_k.stride()[:2], *new_v.stride()[:2], *kv.k_pages.stride()[:3],
        PAGE=page_size, H=num_kv_heads, BLOCK_H=triton.next_power_of_2(num_kv_heads), D=head_dim,
    )  # fmt: skip


@triton.jit
def _page_of(pages, start, num_keys, PAGE: tl.constexpr, BLOCK_KV: tl.constexpr):
    """The page of each key of a tile from `start`: one number where all keys share a page."""
    keys = start if PAGE >= BLOCK_KV else start + tl.arange(0, BLOCK_KV)
    return tl.load(pages + tl.minimum(keys, num_keys - 1) // PAGE).to(tl.int64)


@triton.jit
def _attend(
    acc, row_max, row_sum, q, k_head, v_head, page, start, first_key, num_keys, first_keys,
    visible_keys, qk_scale, tanh_scale, stride_page, stride_slot: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_KV: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One online-softmax step over a tile of keys.

    Row i sees keys [first_keys[i], visible_keys[i]), all of which lie in [first_key, num_keys).
    Scores in base 2 are qk_scale * s for s = q k^T, or qk_scale * tanh(tanh_scale * s).

    Invariant: acc and row_sum are relative to 2^row_max. A row that has seen no key yet keeps the
    finite start value of row_max, so that 2^(-inf - row_max) is 0 and never NaN.
    """
    keys = tl.arange(0, BLOCK_KV)
    if PAGE >= BLOCK_KV:
        tile = page * stride_page + start % PAGE * stride_slot
        tile += (keys * stride_slot)[:, None] + tl.arange(0, D)[None, :]
    else:
        tile = page[:, None] * stride_page
        tile += (keys % PAGE * stride_slot)[:, None] + tl.arange(0, D)[None, :]
    if MASKED:
        inside = (start + keys < num_keys)[:, None]
        if first_keys is not None:
            inside &= (start + keys >= first_key)[:, None]
        k = tl.load(k_head + tile, mask=inside, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        if tanh_scale is not None:
            s = tanh(s * tanh_scale)
        seen = (start + keys)[None, :] < visible_keys[:, None]
        if first_keys is not None:
            seen &= (start + keys)[None, :] >= first_keys[:, None]
        s = tl.where(seen, s, float("-inf"))
        v = tl.load(v_head + tile, mask=inside, other=0.0)
    else:
        k = tl.load(k_head + tile)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        if tanh_scale is not None:
            s = tanh(s * tanh_scale)
        v = tl.load(v_head + tile)
    new_max = tl.maximum(row_max, tl.max(s, 1) * qk_scale)
    p = tl.exp2(s * qk_scale - new_max[:, None])
    alpha = tl.exp2(row_max - new_max)
    row_sum = row_sum * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return acc, new_max, row_sum


@triton.jit
def partial_kernel(
    q, k_pages, v_pages, partial_out, partial_lse, rows, positions, pages, items, least_m, most_m,
    window, scale, softcap, stride_qn, stride_qh, stride_page, stride_slot: tl.constexpr,
    stride_head, HKV: tl.constexpr, GROUP: tl.constexpr, ROW_TILES: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_KV: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One program per (item, KV head, tile of matrix rows), for items of least_m to most_m rows."""
    # Row tiles run fastest: those of one item fetch the same pages, all but the first from L2.
    first_m = tl.program_id(0) % ROW_TILES * BLOCK_M
    head = tl.program_id(0) // ROW_TILES % HKV
    item = items + tl.program_id(0) // (ROW_TILES * HKV) * 6
    first_row = tl.load(item + 3)
    num_m = (tl.load(item + 4) - first_row) * GROUP
    if first_m >= num_m or num_m < least_m or num_m > most_m:
        return
    pages += tl.load(item)
    num_keys = tl.load(item + 1)
    first_position = tl.load(item + 2)
    first_slot = tl.load(item + 5)

    m = first_m + tl.arange(0, BLOCK_M)
    inside = m < num_m
    row = first_row + m // GROUP
    q_head = head * GROUP + m % GROUP
    dims = tl.arange(0, D)[None, :]
    q_row = tl.load(rows + row, mask=inside, other=0).to(tl.int64)
    q_tile = q + (q_row * stride_qn + q_head * stride_qh)[:, None] + dims
    q_rows = tl.load(q_tile, mask=inside[:, None], other=0.0)

    # Row i sees keys [first_keys[i], visible_keys[i]), from 0 on without a window; every row sees
    # all keys in [first_full, num_full), and none before first_key or from num_keys on.
    visible_keys = tl.load(positions + row, mask=inside, other=-1) + 1 - first_position
    first_keys = None
    first_key = 0
    first_full = 0
    if window is not None:
        first_keys = tl.maximum(visible_keys, 0) - window
        sees = inside & (visible_keys > 0) & (first_keys < num_keys)
        first_key = tl.maximum(tl.min(tl.where(sees, first_keys, num_keys), 0), 0)
        if first_key >= num_keys:
            # Nothing reads the outputs of a slot whose log-sum-exp is -inf.
            slot = (first_slot + m // GROUP).to(tl.int64) * (HKV * GROUP) + q_head
            tl.store(partial_lse + slot, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=inside)
            return
        latest = tl.maximum(tl.max(tl.where(sees, first_keys, first_key), 0), first_key)
        first_full = tl.cdiv(latest, BLOCK_KV) * BLOCK_KV
        visible_keys = tl.where(sees, visible_keys, 0)
    visible_keys = tl.minimum(visible_keys, num_keys)
    num_keys = tl.max(visible_keys, 0)
    least = tl.min(tl.where(inside, visible_keys, num_keys), 0)
    num_full = tl.maximum(least, 0) // BLOCK_KV * BLOCK_KV

    acc = tl.zeros([BLOCK_M, D], tl.float32)
    row_max = tl.full([BLOCK_M], -1.0e30, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    k_head = k_pages + head.to(tl.int64) * stride_head
    v_head = v_pages + head.to(tl.int64) * stride_head
    qk_scale = scale * LOG2E if softcap is None else softcap * LOG2E
    tanh_scale = None if softcap is None else scale / softcap
    if num_keys > 0:
        # `page` is always read one iteration ahead: an address that waits for a load in the same
        # iteration would cost the pipeline a stage.
        first_tile = first_key // BLOCK_KV * BLOCK_KV
        page = _page_of(pages, first_tile, num_keys, PAGE, BLOCK_KV)
        if window is not None:
            num_full = tl.maximum(num_full, first_full)
            for start in range(first_tile, first_full, BLOCK_KV):
                next_page = _page_of(pages, start + BLOCK_KV, num_keys, PAGE, BLOCK_KV)
                acc, row_max, row_sum = _attend(
                    acc, row_max, row_sum, q_rows, k_head, v_head, page, start, first_key, num_keys,
                    first_keys, visible_keys, qk_scale, tanh_scale, stride_page, stride_slot, PAGE,
                    BLOCK_KV, D, MASKED=True,
                )  # fmt: skip
                page = next_page
        for start in range(first_full, num_full, BLOCK_KV):
            next_page = _page_of(pages, start + BLOCK_KV, num_keys, PAGE, BLOCK_KV)
            acc, row_max, row_sum = _attend(
                acc, row_max, row_sum, q_rows, k_head, v_head, page, start, first_key, num_keys,
                first_keys, visible_keys, qk_scale, tanh_scale, stride_page, stride_slot, PAGE,
                BLOCK_KV, D, MASKED=False,
            )  # fmt: skip
            page = next_page
        for start in range(num_full, num_keys, BLOCK_KV):
            next_page = _page_of(pages, start + BLOCK_KV, num_keys, PAGE, BLOCK_KV)
            acc, row_max, row_sum = _attend(
                acc, row_max, row_sum, q_rows, k_head, v_head, page, start, first_key, num_keys,
                first_keys, visible_keys, qk_scale, tanh_scale, stride_page, stride_slot, PAGE,
                BLOCK_KV, D, MASKED=True,
            )  # fmt: skip
            page = next_page

    seen = row_sum > 0
    slot = (first_slot + m // GROUP).to(tl.int64) * (HKV * GROUP) + q_head
    out_rows = acc / tl.where(seen, row_sum, 1.0)[:, None]
    tl.store(partial_out + slot[:, None] * D + dims, out_rows, mask=inside[:, None])
    log_sums = tl.where(seen, row_max + tl.log2(tl.where(seen, row_sum, 1.0)), float("-inf"))
    tl.store(partial_lse + slot, log_sums, mask=inside)


def partial(
    q: Tensor,
    kv: PagedKV,
    plan: DecodePlan,
    scale: float,
    options: ScoreOptions,
) -> tuple[Tensor, Tensor]:
    """Attention of every item: outputs [slots, Hq, D] and base-2 log-sum-exps [slots, Hq], float32.

    A row that sees no key of an item gets -inf there, and 0 or, under a window, anything. q's last
    dimension is contiguous.
    """
    _, num_heads, head_dim = q.shape
    _, page_size, num_kv_heads, _ = kv.k_pages.shape
    slots = plan.capacity.slots
    out = torch.empty(slots, num_heads, head_dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(slots, num_heads, dtype=torch.float32, device=q.device)
    for config, least, most in launches_for(q, kv, plan):
        row_tiles = -(-min(matrix_rows(q, kv, plan), most) // config.block_m)
        launch(
            partial_kernel, (plan.capacity.items * num_kv_heads * row_tiles,),
            q, kv.k_pages, kv.v_pages, out, lse, plan.rows, plan.positions, plan.pages, plan.items,
            least, most, options.window, scale, options.softcap,
            *q.stride()[:2], *kv.k_pages.stride()[:3],
            HKV=num_kv_heads, GROUP=num_heads // num_kv_heads, ROW_TILES=row_tiles, PAGE=page_size,
            BLOCK_M=config.block_m, BLOCK_KV=config.block_kv, D=head_dim,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out, lse


@triton.jit
def merge_kernel(
    partial_out, partial_lse, sinks, out, rows, merge_ptr, merge_slots, stride_on, stride_oh,
    HQ: tl.constexpr, D: tl.constexpr, BLOCK_S: tl.constexpr, GAPS: tl.constexpr,
):  # fmt: skip
    """One program per (row, query head). GAPS: slots of log-sum-exp -inf have no output."""
    row = tl.program_id(0) // HQ
    head = tl.program_id(0) % HQ
    dims = tl.arange(0, D)
    acc = tl.zeros([D], tl.float32)
    max_lse = -1.0e30
    total = 0.0
    if sinks is not None:
        # The sink is the first partial result: a term of the sum, without a value.
        sink = tl.load(sinks + head) * LOG2E
        max_lse = tl.maximum(sink, max_lse)
        total = tl.exp2(sink - max_lse)
    end = tl.load(merge_ptr + row + 1)
    for start in range(tl.load(merge_ptr + row), end, BLOCK_S):
        index = start + tl.arange(0, BLOCK_S)
        inside = index < end
        slot = tl.load(merge_slots + index, mask=inside, other=0).to(tl.int64) * HQ + head
        lse = tl.load(partial_lse + slot, mask=inside, other=float("-inf"))
        if GAPS:
            inside = lse > float("-inf")
        parts = tl.load(
            partial_out + slot[:, None] * D + dims[None, :], mask=inside[:, None], other=0.0
        )
        new_max = tl.maximum(max_lse, tl.max(lse, 0))
        weights = tl.exp2(lse - new_max)
        alpha = tl.exp2(max_lse - new_max)
        acc = acc * alpha + tl.sum(weights[:, None] * parts, 0)
        total = total * alpha + tl.sum(weights, 0)
        max_lse = new_max
    merged = acc / tl.where(total == 0, 1.0, total)  # padding rows have nothing to merge
    to = out + tl.load(rows + row).to(tl.int64) * stride_on + head * stride_oh + dims
    tl.store(to, merged.to(out.dtype.element_ty))


def merge(
    plan: DecodePlan,
    partial_out: Tensor,
    partial_lse: Tensor,
    options: ScoreOptions,
    out: Tensor,
) -> None:
    """Fills out [Q, Hq, D] from the partial results; each row goes to its caller's place.

    options: as in `partial`; its sinks are float32.
    """
    num_rows, num_heads, head_dim = out.shape
    launch(
        merge_kernel, (num_rows * num_heads,),
        partial_out, partial_lse, options.sinks, out, plan.rows, plan.merge_ptr, plan.merge_slots,
        *out.stride()[:2], HQ=num_heads, D=head_dim, BLOCK_S=16,
        GAPS=options.window is not None, num_warps=2,
    )  # fmt: skip
