"""Triton forward kernel of trie attention: one program per (query block, query head).

It gets `subtree_ends`, a block schedule and a configuration.
Every KV block that a schedule calls full is read without any mask; a partial one is masked by
`column <= row < subtree_ends[column]` (docs/architecture.md, facts 1 and 3), and under a window
also by `window_starts[row] <= column`.

`window_starts` and `softcap` are None where there is none: the compiler then drops the argument
with all that asks for it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tw_kernels import triton_device
from tw_kernels.trie import BlockSchedule
from tw_kernels.triton_softcap import tanh

LOG2E = tl.constexpr(math.log2(math.e))


class Config(NamedTuple):
    """Sizes of one kernel. Its schedule depends on block_q and block_kv alone.

    partial_stages: how deep the loop over partial blocks is pipelined. They are few in a row of the
    schedule, and their mask takes registers, so 1 (not at all) or 2 can be worth more than 3.
    """

    block_q: int
    block_kv: int
    num_warps: int
    num_stages: int
    partial_stages: int


def launch(kernel: Any, grid: tuple[int, int], config: Config, head_dim: int, *args) -> None:
    """Runs a kernel of some configuration."""
    triton_device.launch(
        kernel,
        grid,
        *args,
        BLOCK_Q=config.block_q,
        BLOCK_KV=config.block_kv,
        D=head_dim,
        PARTIAL_STAGES=config.partial_stages,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


@triton.jit
def tile_offsets(stride_row: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr):
    """Offsets of a [BLOCK, D] tile from its first element; they fit in 32 bits."""
    return tl.arange(0, BLOCK)[:, None] * stride_row + tl.arange(0, D)[None, :]


@triton.jit
def visible(rows, columns, column_ends):
    """The trie mask, for index vectors already broadcast against each other."""
    return (columns <= rows) & (rows < column_ends)


@triton.jit
def _attend(
    acc, row_max, row_sum, q, k_head, v_head, stride_kn: tl.constexpr, stride_vn: tl.constexpr,
    subtree_ends, rows, row_starts, num_tokens, qk_scale, tanh_scale, block,
    BLOCK_KV: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One online-softmax step over a KV block.

    Scores in base 2 are qk_scale * s for s = q k^T, or qk_scale * tanh(tanh_scale * s).

    Invariant: acc and row_sum are relative to 2^row_max. A row that has seen no column yet keeps
    the finite start value of row_max, so that 2^(-inf - row_max) is 0 and never NaN.
    """
    start = block * BLOCK_KV
    k_tile = k_head + start.to(tl.int64) * stride_kn + tile_offsets(stride_kn, BLOCK_KV, D)
    v_tile = v_head + start.to(tl.int64) * stride_vn + tile_offsets(stride_vn, BLOCK_KV, D)
    if MASKED:
        columns = start + tl.arange(0, BLOCK_KV)
        inside = columns < num_tokens
        ends = tl.load(subtree_ends + columns, mask=inside, other=0)
        k = tl.load(k_tile, mask=inside[:, None], other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        if tanh_scale is not None:
            s = tanh(s * tanh_scale)
        seen = visible(rows[:, None], columns[None, :], ends[None, :])
        if row_starts is not None:
            seen &= row_starts[:, None] <= columns[None, :]
        s = tl.where(seen, s, float("-inf"))
        v = tl.load(v_tile, mask=inside[:, None], other=0.0)
    else:
        k = tl.load(k_tile)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        if tanh_scale is not None:
            s = tanh(s * tanh_scale)
        v = tl.load(v_tile)
    new_max = tl.maximum(row_max, tl.max(s, 1) * qk_scale)
    p = tl.exp2(s * qk_scale - new_max[:, None])
    alpha = tl.exp2(row_max - new_max)
    row_sum = row_sum * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return acc, new_max, row_sum


# num_tokens changes with every batch and is read by masks only: one compiled kernel serves all.
# Row strides change with the model only: as constants they free registers, addresses of a tile
# being one base plus immediates.
@triton.jit(do_not_specialize=["num_tokens"])
def forward_kernel(
    q, k, v, out, lse, subtree_ends, window_starts, row_ptr, full_end, kv_blocks, q_order,
    num_tokens, group, scale, softcap, stride_qn: tl.constexpr, stride_qh, stride_kn: tl.constexpr,
    stride_kh, stride_vn: tl.constexpr, stride_vh, stride_on: tl.constexpr, stride_oh,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, D: tl.constexpr, PARTIAL_STAGES: tl.constexpr,
):  # fmt: skip
    """One program per (query block, query head): out, and lse in natural logarithm."""
    head = tl.program_id(0)
    q_block = tl.load(q_order + tl.program_id(1))
    start = q_block * BLOCK_Q
    rows = start + tl.arange(0, BLOCK_Q)
    inside = (rows < num_tokens)[:, None]
    k_head = k + (head // group).to(tl.int64) * stride_kh
    v_head = v + (head // group).to(tl.int64) * stride_vh
    q_tile = q + head.to(tl.int64) * stride_qh + start.to(tl.int64) * stride_qn
    q_rows = tl.load(q_tile + tile_offsets(stride_qn, BLOCK_Q, D), mask=inside, other=0.0)
    row_starts = None
    if window_starts is not None:
        row_starts = tl.load(window_starts + rows, mask=rows < num_tokens, other=0)

    acc = tl.zeros([BLOCK_Q, D], tl.float32)
    row_max = tl.full([BLOCK_Q], -1.0e30, tl.float32)
    row_sum = tl.zeros([BLOCK_Q], tl.float32)
    qk_scale = scale * LOG2E if softcap is None else softcap * LOG2E
    tanh_scale = None if softcap is None else scale / softcap
    row_start = tl.load(row_ptr + q_block)
    first_partial = tl.load(full_end + q_block)
    row_end = tl.load(row_ptr + q_block + 1)
    # `block` is always read one iteration ahead: an address that waits for a load in the same
    # iteration would cost the pipeline a stage.
    block = tl.load(kv_blocks + row_start)
    for i in range(row_start, first_partial):
        next_block = tl.load(kv_blocks + tl.minimum(i + 1, row_end - 1))
        acc, row_max, row_sum = _attend(
            acc, row_max, row_sum, q_rows, k_head, v_head, stride_kn, stride_vn, subtree_ends, rows,
            row_starts, num_tokens, qk_scale, tanh_scale, block, BLOCK_KV, D, MASKED=False,
        )  # fmt: skip
        block = next_block
    for i in tl.range(first_partial, row_end, num_stages=PARTIAL_STAGES):
        next_block = tl.load(kv_blocks + tl.minimum(i + 1, row_end - 1))
        acc, row_max, row_sum = _attend(
            acc, row_max, row_sum, q_rows, k_head, v_head, stride_kn, stride_vn, subtree_ends, rows,
            row_starts, num_tokens, qk_scale, tanh_scale, block, BLOCK_KV, D, MASKED=True,
        )  # fmt: skip
        block = next_block

    out_tile = out + head.to(tl.int64) * stride_oh + start.to(tl.int64) * stride_on
    out_rows = (acc / row_sum[:, None]).to(out.dtype.element_ty)
    tl.store(out_tile + tile_offsets(stride_on, BLOCK_Q, D), out_rows, mask=inside)
    log_sums = (row_max + tl.log2(row_sum)) / LOG2E
    tl.store(lse + head.to(tl.int64) * num_tokens + rows, log_sums, mask=rows < num_tokens)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    subtree_ends: Tensor,
    window_starts: Tensor | None,
    schedule: BlockSchedule,
    scale: float,
    softcap: float | None,
    config: Config,
) -> tuple[Tensor, Tensor]:
    """Launches the kernel on q's device.

    Args:
        q: [N, Hq, D]; k, v: [N, Hkv, D], one dtype, last dimension contiguous, other strides free.
        subtree_ends: int32 [N].
        window_starts: int32 [N], or None without a window.
        schedule: for (config.block_q, config.block_kv) and that window.
        scale: positive factor of the scores.
        softcap: positive bound of the scores, or None.

    Returns:
        out [N, Hq, D] in q's dtype and lse [Hq, N] float32, natural logarithm.
    """
    num_tokens, num_heads, head_dim = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(num_heads, num_tokens, dtype=torch.float32, device=q.device)
    launch(
        forward_kernel, (num_heads, schedule.q_order.numel()), config, head_dim,
        q, k, v, out, lse, subtree_ends, window_starts,
        schedule.row_ptr, schedule.full_end, schedule.kv_blocks, schedule.q_order,
        num_tokens, num_heads // k.shape[1], scale, softcap,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *out.stride()[:2],
    )  # fmt: skip
    return out, lse
