"""trie_attention by FlashAttention 4 (package flash-attn-4, extra `flash`) on Hopper and Blackwell.

Only taken by name (backend="flash" or TW_BACKEND=flash). The trie's inequality is FA4's mask_mod,
with subtree_ends as its auxiliary tensor, and our block schedule is its block-sparse tensors: full
blocks run without the mask, hidden ones not at all. The interface is that of 4.0.0b36
(flash_attn/cute/interface.py and block_sparsity.py; the backward pass is called by its private
name, because ours gets out and lse from the op). Not yet run on a GPU: the block-sparse tensors are
tested against the dense mask, and both passes compiled for sm_90a (head dim 128, 4 query heads
a KV head); for Blackwell its compiler asks a driver for the device.

bfloat16 and float16, head dims 64 and 128; no windows and no soft caps. dQ is summed by atomics:
its last bits change from run to run. A kernel compiles at its first call, which takes seconds.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tw_kernels.trie import BlockSchedule, TrieLayout

HEAD_DIMS = (64, 128)
# Rows and columns of a block, by the major compute capability: tiles of 128 x 128, of which a block
# of Blackwell's forward kernel takes two.
BLOCKS = {9: (128, 128), 10: (256, 128), 11: (256, 128)}


class SparseBlocks(NamedTuple):
    """BlockSparseTensorsTorch's first fields: of each block of one side those of the other that
    hold a visible pair, int32. Entries from a count on mean nothing."""

    mask_count: Tensor  # [1, 1, M]
    mask_index: Tensor  # [1, 1, M, K], ascending
    full_count: Tensor  # [1, 1, M]
    full_index: Tensor  # [1, 1, M, K], ascending


class Plan(NamedTuple):
    """subtree_ends, padded to whole blocks, and the blocks of rows and of columns."""

    ends: Tensor
    blocks: tuple[int, int]
    rows: SparseBlocks
    columns: SparseBlocks


def why_not(
    q: Tensor, k: Tensor, v: Tensor, window: int | None = None, softcap: float | None = None
) -> str | None:
    """None if this call can run, else the reason in one line."""
    if window is not None or softcap is not None:
        return "the flash backend has no window and no soft cap"
    if q.device.type != "cuda":
        return f"FlashAttention 4 runs on a Hopper or Blackwell GPU, not on {q.device.type}"
    capability = torch.cuda.get_device_capability(q.device)
    if capability[0] not in BLOCKS:
        return f"FlashAttention 4 masks on compute capability 9 to 11, not {capability[0]}"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"FlashAttention 4 takes bfloat16 and float16, not {q.dtype}"
    if q.shape[-1] not in HEAD_DIMS:
        return f"the flash backend takes head dims 64 and 128, not {q.shape[-1]}"
    if not _is_installed():
        return "flash-attn-4 is not installed: pip install 'threadweaver[flash]'"
    return None


@cache
def _is_installed() -> bool:
    try:
        return importlib.util.find_spec("flash_attn.cute") is not None
    except ModuleNotFoundError:  # no flash_attn at all
        return False


def plan(layout: TrieLayout, q: Tensor, window: None = None) -> Plan:
    """The plan of a trie on q's device. The layout keeps it."""
    return plan_of(layout, BLOCKS[torch.cuda.get_device_capability(q.device)[0]])


def plan_of(layout: TrieLayout, blocks: tuple[int, int]) -> Plan:
    """The plan for blocks of that many rows and columns."""
    key = "flash", blocks
    if key not in layout.memo:
        schedule = layout.block_schedule(*blocks)
        missing = -layout.num_tokens % max(blocks)  # a mask may be asked for columns beyond N
        layout.memo[key] = Plan(
            F.pad(layout.subtree_ends, (0, missing)),
            blocks,
            _sparse_rows(schedule),
            _sparse_columns(schedule),
        )
    return layout.memo[key]


def _sparse_rows(schedule: BlockSchedule) -> SparseBlocks:
    """KV blocks of every block of rows."""
    first, full_end, end = schedule.row_ptr[:-1], schedule.full_end, schedule.row_ptr[1:]
    steps = torch.arange(len(schedule.kv_order), dtype=torch.int32, device=first.device)

    def listed(start: Tensor) -> Tensor:
        at = (start[:, None] + steps).clamp(max=len(schedule.kv_blocks) - 1)
        return schedule.kv_blocks[at][None, None]

    return SparseBlocks(
        (end - full_end)[None, None],
        listed(full_end),
        (full_end - first)[None, None],
        listed(first),
    )


def _sparse_columns(schedule: BlockSchedule) -> SparseBlocks:
    """Row blocks of every block of columns: masked ones stand before and after the full ones."""
    first, full_first, full_last, last = (x[:, None] for x in schedule.q_range.unbind(1))
    row_blocks = len(schedule.q_order)
    steps = torch.arange(row_blocks, dtype=torch.int32, device=first.device)
    before = full_first - first
    masked = torch.where(steps < before, first + steps, full_last + steps - before)
    return SparseBlocks(
        (before + last - full_last).view(1, 1, -1),
        masked.clamp(max=row_blocks - 1)[None, None],
        (full_last - full_first).view(1, 1, -1),
        (full_first + steps).clamp(max=row_blocks - 1)[None, None],
    )


@cache
def _mask() -> Callable[..., Any]:
    """FA4's mask_mod: whether a row sees a column."""
    import cutlass  # pyright: ignore[reportMissingImports]
    from cutlass import cute  # pyright: ignore[reportMissingImports]
    from flash_attn.cute import utils  # pyright: ignore[reportMissingImports]

    @cute.jit
    def sees(batch, head, row, column, lengths, aux_tensors):
        end = utils.scalar_to_ssa(aux_tensors[0][column[0]], cutlass.Int32)
        return (column <= row) & (row < end)

    return sees


def _block_sparse(blocks: SparseBlocks, size: tuple[int, int]) -> Any:
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch  # pyright: ignore[reportMissingImports]

    return BlockSparseTensorsTorch(*blocks, block_size=size)


def forward(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, softcap: None = None
) -> tuple[Tensor, Tensor]:
    """out [N, Hq, D] in q's dtype and lse [Hq, N], float32."""
    from flash_attn.cute.interface import flash_attn_func  # pyright: ignore[reportMissingImports]

    out, lse = flash_attn_func(
        *(x.unsqueeze(0) for x in (q, k, v)),
        softmax_scale=scale,
        pack_gqa=False,  # a block's rows are those of one head
        mask_mod=_mask(),
        aux_tensors=[plan.ends],
        block_sparse_tensors=_block_sparse(plan.rows, plan.blocks),
        return_lse=True,
    )
    return out.squeeze(0), lse.squeeze(0)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Plan,
    scale: float,
    softcap: None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq [N, Hq, D], dk and dv [N, Hkv, D] in the dtypes of q, k and v."""
    from flash_attn.cute.interface import _flash_attn_bwd  # pyright: ignore[reportMissingImports]

    dq, dk, dv = _flash_attn_bwd(
        *(x.unsqueeze(0) for x in (q, k, v, out, dout, lse)),
        softmax_scale=scale,
        mask_mod=_mask(),
        aux_tensors=[plan.ends],
        block_sparse_tensors=_block_sparse(plan.columns, plan.blocks),
    )
    return dq.squeeze(0), dk.squeeze(0), dv.squeeze(0)
