"""Triton backward kernels of trie attention: delta, dQ, and dK with dV.

With P = exp(scale * Q K^T - lse) and delta = rowsum(dO * O), dS = P * (dO V^T - delta), and then
dV = P^T dO, dQ = scale * dS K, dK = scale * dS^T Q. A soft cap makes the scores cap * t with
t = tanh(scale * Q K^T / cap), and gives dS one more factor, 1 - t^2. Every gradient element is
written by one program that adds its terms in a fixed order: no atomics, so two runs agree to the
last bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tw_kernels import triton_device
from tw_kernels.attention.triton.forward_kernel import (
    LOG2E,
    Config,
    launch,
    tile_offsets,
    visible,
)
from tw_kernels.trie import BlockSchedule
from tw_kernels.triton_softcap import tanh

STATS_ROWS = 128  # a multiple of every BLOCK_Q


@triton.jit(do_not_specialize=["num_tokens"])
def row_stats_kernel(
    dout, out, lse, lse2, delta, num_tokens, stride_gn: tl.constexpr, stride_gh,
    stride_on: tl.constexpr, stride_oh, stride_stats,
    BLOCK_Q: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One program per (query block, query head): delta = sum(dout * out), lse2 = lse in base 2."""
    head = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * BLOCK_Q
    rows = start + tl.arange(0, BLOCK_Q)
    inside = rows < num_tokens
    g_tile = dout + head * stride_gh + start.to(tl.int64) * stride_gn
    o_tile = out + head * stride_oh + start.to(tl.int64) * stride_on
    g = tl.load(g_tile + tile_offsets(stride_gn, BLOCK_Q, D), mask=inside[:, None], other=0.0)
    o = tl.load(o_tile + tile_offsets(stride_on, BLOCK_Q, D), mask=inside[:, None], other=0.0)
    tl.store(delta + head * stride_stats + rows, tl.sum(g.to(tl.float32) * o.to(tl.float32), 1))
    log_sums = tl.load(lse + head * num_tokens + rows, mask=inside, other=0.0)
    tl.store(lse2 + head * stride_stats + rows, log_sums * LOG2E)


@triton.jit
def _add_dq(
    dq, q, g, lse2, delta, k_head, v_head, stride_kn: tl.constexpr, stride_vn: tl.constexpr,
    subtree_ends, rows, row_starts, num_tokens, qk_scale, tanh_scale, block,
    BLOCK_KV: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds dS K of one KV block to dq. A full block lies inside [0, N): no mask at all."""
    start = block * BLOCK_KV
    k_tile = k_head + start.to(tl.int64) * stride_kn + tile_offsets(stride_kn, BLOCK_KV, D)
    v_tile = v_head + start.to(tl.int64) * stride_vn + tile_offsets(stride_vn, BLOCK_KV, D)
    if MASKED:
        columns = start + tl.arange(0, BLOCK_KV)
        inside = columns < num_tokens
        ends = tl.load(subtree_ends + columns, mask=inside, other=0)
        k = tl.load(k_tile, mask=inside[:, None], other=0.0)
        v = tl.load(v_tile, mask=inside[:, None], other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        if tanh_scale is not None:
            s = tanh(s * tanh_scale)
        p = tl.exp2(s * qk_scale - lse2[:, None])
        seen = visible(rows[:, None], columns[None, :], ends[None, :])
        if row_starts is not None:
            seen &= row_starts[:, None] <= columns[None, :]
        p = tl.where(seen, p, 0.0)
    else:
        k = tl.load(k_tile)
        v = tl.load(v_tile)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        if tanh_scale is not None:
            s = tanh(s * tanh_scale)
        p = tl.exp2(s * qk_scale - lse2[:, None])
    dp = tl.dot(g, tl.trans(v), input_precision="ieee")
    ds = p * (dp - delta[:, None])
    if tanh_scale is not None:
        ds *= 1 - s * s
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit(do_not_specialize=["num_tokens"])
def dq_kernel(
    dout, q, k, v, lse2, delta, dq, subtree_ends, window_starts, row_ptr, full_end, kv_blocks,
    q_order, num_tokens, group, scale, softcap, stride_gn: tl.constexpr, stride_gh,
    stride_qn: tl.constexpr, stride_qh, stride_kn: tl.constexpr, stride_kh,
    stride_vn: tl.constexpr, stride_vh, stride_dqn: tl.constexpr, stride_dqh, stride_stats,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, D: tl.constexpr, PARTIAL_STAGES: tl.constexpr,
):  # fmt: skip
    """One program per (query block, query head), over the same CSR row as the forward."""
    head = tl.program_id(0)
    q_block = tl.load(q_order + tl.program_id(1))
    start = q_block * BLOCK_Q
    rows = start + tl.arange(0, BLOCK_Q)
    inside = rows < num_tokens
    k_head = k + (head // group).to(tl.int64) * stride_kh
    v_head = v + (head // group).to(tl.int64) * stride_vh
    q_tile = q + head.to(tl.int64) * stride_qh + start.to(tl.int64) * stride_qn
    g_tile = dout + head.to(tl.int64) * stride_gh + start.to(tl.int64) * stride_gn
    q_rows = tl.load(q_tile + tile_offsets(stride_qn, BLOCK_Q, D), mask=inside[:, None], other=0.0)
    g_rows = tl.load(g_tile + tile_offsets(stride_gn, BLOCK_Q, D), mask=inside[:, None], other=0.0)
    # Rows beyond N: q = dout = lse2 = delta = 0, every term finite, and never stored.
    at_rows = head.to(tl.int64) * stride_stats + rows
    lse2_rows = tl.load(lse2 + at_rows)
    delta_rows = tl.load(delta + at_rows)
    row_starts = None
    if window_starts is not None:
        row_starts = tl.load(window_starts + rows, mask=inside, other=0)
    qk_scale = scale * LOG2E if softcap is None else softcap * LOG2E
    tanh_scale = None if softcap is None else scale / softcap

    acc = tl.zeros([BLOCK_Q, D], tl.float32)
    row_start = tl.load(row_ptr + q_block)
    first_partial = tl.load(full_end + q_block)
    row_end = tl.load(row_ptr + q_block + 1)
    # As in the forward, `block` is read one iteration ahead.
    block = tl.load(kv_blocks + row_start)
    for i in range(row_start, first_partial):
        next_block = tl.load(kv_blocks + tl.minimum(i + 1, row_end - 1))
        acc = _add_dq(
            acc, q_rows, g_rows, lse2_rows, delta_rows, k_head, v_head, stride_kn, stride_vn,
            subtree_ends, rows, row_starts, num_tokens, qk_scale, tanh_scale, block, BLOCK_KV, D,
            MASKED=False,
        )  # fmt: skip
        block = next_block
    for i in tl.range(first_partial, row_end, num_stages=PARTIAL_STAGES):
        next_block = tl.load(kv_blocks + tl.minimum(i + 1, row_end - 1))
        acc = _add_dq(
            acc, q_rows, g_rows, lse2_rows, delta_rows, k_head, v_head, stride_kn, stride_vn,
            subtree_ends, rows, row_starts, num_tokens, qk_scale, tanh_scale, block, BLOCK_KV, D,
            MASKED=True,
        )  # fmt: skip
        block = next_block
    dq_tile = dq + head.to(tl.int64) * stride_dqh + start.to(tl.int64) * stride_dqn
    tl.store(
        dq_tile + tile_offsets(stride_dqn, BLOCK_Q, D),
        (acc * scale).to(dq.dtype.element_ty),
        mask=inside[:, None],
    )


@triton.jit
def _add_dkv(
    dk, dv, k, v, columns, ends, window_starts, q, dout, lse2, delta, stride_qn: tl.constexpr,
    stride_qh, stride_gn: tl.constexpr, stride_gh, stride_stats, num_tokens, scale, softcap,
    head, block,
    BLOCK_Q: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds the terms of one (query head, query block) to dk and dv.

    Scores stand transposed, [BLOCK_KV, BLOCK_Q], so that P^T and dS^T enter their products from
    registers.
    """
    start = block * BLOCK_Q
    rows = start + tl.arange(0, BLOCK_Q)
    q_tile = q + head.to(tl.int64) * stride_qh + start.to(tl.int64) * stride_qn
    g_tile = dout + head.to(tl.int64) * stride_gh + start.to(tl.int64) * stride_gn
    q_tile += tile_offsets(stride_qn, BLOCK_Q, D)
    g_tile += tile_offsets(stride_gn, BLOCK_Q, D)
    if MASKED:
        inside = (rows < num_tokens)[:, None]
        q_rows = tl.load(q_tile, mask=inside, other=0.0)
        g_rows = tl.load(g_tile, mask=inside, other=0.0)
    else:
        q_rows = tl.load(q_tile)
        g_rows = tl.load(g_tile)
    at_rows = head.to(tl.int64) * stride_stats + rows
    s = tl.dot(k, tl.trans(q_rows), input_precision="ieee")
    qk_scale = scale * LOG2E if softcap is None else softcap * LOG2E
    if softcap is not None:
        s = tanh(s * (scale / softcap))
    p = tl.exp2(s * qk_scale - tl.load(lse2 + at_rows)[None, :])
    if MASKED:
        seen = visible(rows[None, :], columns[:, None], ends[:, None])
        if window_starts is not None:
            starts = tl.load(window_starts + rows, mask=rows < num_tokens, other=0)
            seen &= starts[None, :] <= columns[:, None]
        p = tl.where(seen, p, 0.0)
    dv = tl.dot(p.to(g_rows.dtype), g_rows, dv, input_precision="ieee")
    dp = tl.dot(v, tl.trans(g_rows), input_precision="ieee")
    ds = p * (dp - tl.load(delta + at_rows)[None, :])
    if softcap is not None:
        ds *= 1 - s * s
    dk = tl.dot(ds.to(q_rows.dtype), q_rows, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _add_blocks(
    dk, dv, k, v, columns, ends, window_starts, q, dout, lse2, delta, stride_qn: tl.constexpr,
    stride_qh, stride_gn: tl.constexpr, stride_gh, stride_stats, num_tokens, scale, softcap,
    first_head, group, first, full_first, full_last, last,
    BLOCK_Q: tl.constexpr, D: tl.constexpr, PARTIAL_STAGES: tl.constexpr,
):  # fmt: skip
    """Adds the terms of query blocks [first, last), full in [full_first, full_last), of all heads.

    Each loop runs over (query head, query block) pairs as one sequence, so that its pipeline is
    filled once.
    """
    num_full = full_last - full_first
    num_partial = last - first - num_full
    head = first_head
    first_partial = tl.where(first < full_first, first, full_last)
    block = first_partial
    for _ in tl.range(group * num_partial, num_stages=PARTIAL_STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        dk, dv = _add_dkv(  # pyright: ignore[reportGeneralTypeIssues]
            dk, dv, k, v, columns, ends, window_starts, q, dout, lse2, delta, stride_qn, stride_qh,
            stride_gn, stride_gh, stride_stats, num_tokens, scale, softcap, head, block,
            BLOCK_Q, D, MASKED=True,
        )  # fmt: skip
        block += 1
        block = tl.where(block == full_first, full_last, block)
        head = tl.where(block == last, head + 1, head)
        block = tl.where(block == last, first_partial, block)
    head = first_head
    block = full_first
    for _ in range(group * num_full):
        dk, dv = _add_dkv(  # pyright: ignore[reportGeneralTypeIssues]
            dk, dv, k, v, columns, ends, window_starts, q, dout, lse2, delta, stride_qn, stride_qh,
            stride_gn, stride_gh, stride_stats, num_tokens, scale, softcap, head, block,
            BLOCK_Q, D, MASKED=False,
        )  # fmt: skip
        block += 1
        head = tl.where(block == full_last, head + 1, head)
        block = tl.where(block == full_last, full_first, block)
    return dk, dv


# How a window leaves the pairs of a KV block with the query blocks of its range.
HIDDEN = tl.constexpr(0)
PARTIAL = tl.constexpr(1)
FULL = tl.constexpr(2)
RUN = tl.constexpr(128)  # query blocks that are looked at in one step


@triton.jit
def _kinds(blocks, q_starts, full_first, full_last, last, first_column, last_column):
    """HIDDEN, PARTIAL or FULL for each of `blocks`; those from `last` on count as HIDDEN."""
    inside = blocks < last
    least = tl.load(q_starts + 2 * blocks, mask=inside, other=last_column + 1)
    greatest = tl.load(q_starts + 2 * blocks + 1, mask=inside, other=last_column + 1)
    full = (full_first <= blocks) & (blocks < full_last) & (greatest <= first_column)
    return tl.where(full, FULL, tl.where(least <= last_column, PARTIAL, HIDDEN))


@triton.jit(do_not_specialize=["num_tokens"])
def dkv_kernel(
    dout, q, k, v, lse2, delta, dk, dv, subtree_ends, window_starts, q_range, q_starts, kv_order,
    num_tokens, group, scale, softcap, stride_gn: tl.constexpr, stride_gh, stride_qn: tl.constexpr,
    stride_qh, stride_kn: tl.constexpr, stride_kh, stride_vn: tl.constexpr, stride_vh,
    stride_dkn: tl.constexpr, stride_dkh, stride_dvn: tl.constexpr, stride_dvh, stride_stats,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, D: tl.constexpr, PARTIAL_STAGES: tl.constexpr,
):  # fmt: skip
    """One program per (KV block, KV head), over the query heads of its group.

    The rows that see a column are contiguous (docs/architecture.md, fact 2), so the query blocks
    are one range: a partial head, a full middle, a partial tail. A window hides some of them.
    """
    kv_head = tl.program_id(0)
    kv_block = tl.load(kv_order + tl.program_id(1))
    start = kv_block * BLOCK_KV
    columns = start + tl.arange(0, BLOCK_KV)
    inside = columns < num_tokens
    k_tile = k + kv_head.to(tl.int64) * stride_kh + start.to(tl.int64) * stride_kn
    v_tile = v + kv_head.to(tl.int64) * stride_vh + start.to(tl.int64) * stride_vn
    k_rows = tl.load(k_tile + tile_offsets(stride_kn, BLOCK_KV, D), mask=inside[:, None], other=0.0)
    v_rows = tl.load(v_tile + tile_offsets(stride_vn, BLOCK_KV, D), mask=inside[:, None], other=0.0)

    first = tl.load(q_range + 4 * kv_block)
    full_first = tl.load(q_range + 4 * kv_block + 1)
    last = tl.load(q_range + 4 * kv_block + 3)
    # A full block may be ragged; it joins the tail, whose mask covers the rows beyond N.
    full_last = tl.load(q_range + 4 * kv_block + 2)
    full_last = tl.maximum(full_first, tl.minimum(full_last, num_tokens // BLOCK_Q))
    dk_rows = tl.zeros([BLOCK_KV, D], tl.float32)
    dv_rows = tl.zeros([BLOCK_KV, D], tl.float32)
    ends = tl.load(subtree_ends + columns, mask=inside, other=0)
    if q_starts is None:
        dk_rows, dv_rows = _add_blocks(
            dk_rows, dv_rows, k_rows, v_rows, columns, ends, window_starts, q, dout, lse2, delta,
            stride_qn, stride_qh, stride_gn, stride_gh, stride_stats, num_tokens, scale,
            softcap, kv_head * group, group, first, full_first, full_last, last,
            BLOCK_Q, D, PARTIAL_STAGES,
        )  # fmt: skip
    else:
        # A window cuts the range into runs of one kind; the hidden ones are stepped over.
        last_column = start + BLOCK_KV - 1
        while first < last:
            kind = _kinds(first, q_starts, full_first, full_last, last, start, last_column)
            ahead = first + tl.arange(0, RUN)
            kinds = _kinds(ahead, q_starts, full_first, full_last, last, start, last_column)
            end = tl.minimum(tl.min(tl.where(kinds == kind, first + RUN, ahead), 0), last)
            dk_rows, dv_rows = _add_blocks(
                dk_rows, dv_rows, k_rows, v_rows, columns, ends, window_starts, q, dout, lse2,
                delta, stride_qn, stride_qh, stride_gn, stride_gh, stride_stats, num_tokens,
                scale, softcap, kv_head * group, group, tl.where(kind == HIDDEN, end, first),
                tl.where(kind == FULL, first, end), end, end, BLOCK_Q, D, PARTIAL_STAGES,
            )  # fmt: skip
            first = end
    dk_tile = dk + kv_head.to(tl.int64) * stride_dkh + start.to(tl.int64) * stride_dkn
    dv_tile = dv + kv_head.to(tl.int64) * stride_dvh + start.to(tl.int64) * stride_dvn
    dk_tile += tile_offsets(stride_dkn, BLOCK_KV, D)
    dv_tile += tile_offsets(stride_dvn, BLOCK_KV, D)
    tl.store(dk_tile, (dk_rows * scale).to(dk.dtype.element_ty), mask=inside[:, None])
    tl.store(dv_tile, dv_rows.to(dv.dtype.element_ty), mask=inside[:, None])


def row_stats(dout: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """What the gradients need of each row, as float32 [Hq, N rounded up to STATS_ROWS].

    Returns:
        lse2: lse in base 2; delta: rowsum(dout * out). Both are zero beyond row N, so that a whole
        block of them can be read without a mask, and their rows are aligned for wide reads.
    """
    num_tokens, num_heads, head_dim = out.shape
    blocks = -(-num_tokens // STATS_ROWS)
    stats = torch.empty(2, num_heads, blocks * STATS_ROWS, dtype=torch.float32, device=out.device)
    triton_device.launch(
        row_stats_kernel, (blocks, num_heads),
        dout, out, lse, *stats, num_tokens,
        *dout.stride()[:2], *out.stride()[:2], stats.stride(1),
        BLOCK_Q=STATS_ROWS, D=head_dim, num_warps=8,
    )  # fmt: skip
    return stats[0], stats[1]


def grad_q(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse2: Tensor,
    delta: Tensor,
    subtree_ends: Tensor,
    window_starts: Tensor | None,
    schedule: BlockSchedule,
    scale: float,
    softcap: float | None,
    config: Config,
) -> Tensor:
    """dQ [N, Hq, D]. Tensors as in the forward; lse and delta contiguous [Hq, N] float32."""
    num_tokens, num_heads, head_dim = q.shape
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    launch(
        dq_kernel, (num_heads, schedule.q_order.numel()), config, head_dim,
        dout, q, k, v, lse2, delta, dq, subtree_ends, window_starts,
        schedule.row_ptr, schedule.full_end, schedule.kv_blocks, schedule.q_order,
        num_tokens, num_heads // k.shape[1], scale, softcap,
        *dout.stride()[:2], *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *dq.stride()[:2],
        lse2.stride(0),
    )  # fmt: skip
    return dq


def grad_kv(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse2: Tensor,
    delta: Tensor,
    subtree_ends: Tensor,
    window_starts: Tensor | None,
    schedule: BlockSchedule,
    scale: float,
    softcap: float | None,
    config: Config,
) -> tuple[Tensor, Tensor]:
    """dK and dV [N, Hkv, D]. Tensors as in `grad_q`."""
    num_tokens, num_kv_heads, head_dim = k.shape
    dk = torch.empty_like(k, memory_format=torch.contiguous_format)
    dv = torch.empty_like(v, memory_format=torch.contiguous_format)
    launch(
        dkv_kernel, (num_kv_heads, schedule.kv_order.numel()), config, head_dim,
        dout, q, k, v, lse2, delta, dk, dv, subtree_ends, window_starts,
        schedule.q_range, schedule.q_starts, schedule.kv_order,
        num_tokens, q.shape[1] // num_kv_heads, scale, softcap,
        *dout.stride()[:2], *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        *dk.stride()[:2], *dv.stride()[:2], lse2.stride(0),
    )  # fmt: skip
    return dk, dv
