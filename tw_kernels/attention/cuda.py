"""trie_attention in CUDA C++ on Hopper GPUs (csrc/cuda/attention/trie_attention.h).

bfloat16 and float16, head dims 64 and 128; no windows and no soft caps. Nothing here waits for the
device. Each gradient is summed in a fixed order: two runs agree to the last bit.

What a block of rows and columns shares is multiplied by a zero probability where the trie hides it:
a NaN or infinity in k, v or dout can reach rows that do not see it, as in any flash attention.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tw_kernels import _C, cuda_build, cuda_device
from tw_kernels.native import DTYPES
from tw_kernels.trie import BlockSchedule, TrieLayout

# Of csrc/cuda/attention/index.h. Coarse kernels: rows or columns that a thread block owns, to a
# multiple of which subtree_ends is padded too; and by head dim the rows of the tiles that stream
# past them in forward, dQ, and dK with dV. Fine kernels: rows and columns of every block.
OWN_ROWS = 128
STREAMED_ROWS = {64: (128, 128, 64), 128: (128, 64, 64)}
FINE = 64

# What a pair costs in blocks of 64 x 64 over what it costs in coarse ones, at most. A step over 64
# columns has the waits, the rescaling of the output and the warps' reductions of one over 128, and
# its score product reads shared memory at the full 128 bytes a cycle, A and B being equally small.
# An estimate. `python -m bench.attention --device cuda --only "case=pack-*" "peer=ours: cuda,*"`
# times both.
FINE_COST = 1.25

FORWARD_CUBIN = cuda_build.CUBINS / "trie_attention_fwd.cubin"
BACKWARD_CUBIN = cuda_build.CUBINS / "trie_attention_bwd.cubin"


class Plan(NamedTuple):
    """A trie, and its subtree_ends padded with zeros to a multiple of OWN_ROWS. Schedules depend on
    the heads of the call; the layout keeps them."""

    layout: TrieLayout
    ends: Tensor


# What csrc/cuda/bindings.cpp takes for them: whether the kernel is the fine one, and addresses.
Rows = tuple[bool, int, int, int, int]
Columns = tuple[bool, int, int]


def why_not(
    q: Tensor, k: Tensor, v: Tensor, window: int | None = None, softcap: float | None = None
) -> str | None:
    """None if this call can run, else the reason in one line."""
    if window is not None or softcap is not None:
        return "the CUDA kernels have no window and no soft cap"
    if reason := cuda_device.why_not(q):
        return reason
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"the CUDA kernels take bfloat16 and float16, not {q.dtype}"
    if q.shape[-1] not in STREAMED_ROWS:
        return f"the CUDA kernels take head dims 64 and 128, not {q.shape[-1]}"
    return cuda_device.why_not_built(FORWARD_CUBIN, BACKWARD_CUBIN)


def plan(layout: TrieLayout, q: Tensor, window: None = None) -> Plan:
    """The plan of a trie. The layout keeps its parts."""
    if "padded_ends" not in layout.memo:
        missing = -layout.num_tokens % OWN_ROWS
        layout.memo["padded_ends"] = F.pad(layout.subtree_ends, (0, missing))
    return Plan(layout, layout.memo["padded_ends"])


def fine_is_cheaper(layout: TrieLayout, coarse: tuple[int, int], heads: float = 1.0) -> bool:
    """Whether a kernel takes blocks of 64 x 64 instead of `coarse` ones (rows, columns).

    Small tries hide most of a large block: of a pack of 64 tries of 512 tokens 52 % of the pairs
    that 128 x 128 computes are visible, 74 % of those that 64 x 64 does. On long paths both are
    nearly all, and the larger blocks cost less a pair.

    heads: those computed over those there are, where a block takes two heads of a group.
    """
    waste = layout.waste(*coarse)
    # No waste is below 1, so most long tries need no second schedule.
    return waste > FINE_COST * heads and waste > FINE_COST * heads * layout.waste(FINE, FINE)


def forward(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, softcap: None = None
) -> tuple[Tensor, Tensor]:
    """out [N, Hq, D] in q's dtype and lse [Hq, N], float32."""
    q, k, v = (_for_bulk_copies(x) for x in (q, k, v))
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
    _C.cuda_trie_attention_forward(
        _sizes(q, k),
        scale,
        cuda_device.place(q, FORWARD_CUBIN),
        plan.ends.data_ptr(),
        _rows(plan.layout, q, k, STREAMED_ROWS[q.shape[2]][0]),
        (_strided(q), _strided(k), _strided(v), _strided(out)),
        lse.data_ptr(),
    )
    return out, lse


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
    dout, q, k, v, out = (_for_bulk_copies(x) for x in (dout, q, k, v, out))
    lse = lse.contiguous()
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    lse2, delta = torch.empty(
        2, q.shape[1], plan.ends.numel(), dtype=torch.float32, device=q.device
    ).unbind()
    _C.cuda_trie_attention_backward(
        _sizes(q, k),
        scale,
        cuda_device.place(q, BACKWARD_CUBIN),
        plan.ends.data_ptr(),
        _rows(plan.layout, q, k, STREAMED_ROWS[q.shape[2]][1]),
        _columns(plan.layout, STREAMED_ROWS[q.shape[2]][2]),
        (_strided(q), _strided(k), _strided(v), _strided(out)),
        (_strided(dout), _strided(dq), _strided(dk), _strided(dv)),
        (lse.data_ptr(), lse2.data_ptr(), delta.data_ptr()),
    )
    return dq, dk, dv


def _for_bulk_copies(x: Tensor) -> Tensor:
    """x if its strides are ones that a tensor map takes, else a contiguous copy.

    The address and both strides are multiples of 16 bytes, and that of the rows a multiple of that
    of the heads (cuTensorMapEncodeTiled in the CUDA driver API).
    """
    address, row_stride, head_stride = _strided(x)
    aligned = address % 16 == 0 and head_stride % 8 == 0
    nested = 0 < head_stride <= row_stride and row_stride % head_stride == 0
    return (
        x
        if aligned and nested and x.stride(2) == 1
        else x.clone(memory_format=torch.contiguous_format)
    )


def _strided(x: Tensor) -> tuple[int, int, int]:
    """Address, strides of rows and heads in elements; where there is one, what a dense one has."""
    row_stride, head_stride, _ = x.stride()
    head_stride = head_stride if x.shape[1] > 1 else x.shape[2]
    row_stride = row_stride if x.shape[0] > 1 else x.shape[1] * head_stride
    return x.data_ptr(), row_stride, head_stride


def _sizes(q: Tensor, k: Tensor) -> tuple[int, int, int, int, int, int]:
    """Tokens, heads, KV heads, head dim, dtype, multiprocessors of the device."""
    multiprocessors = torch.cuda.get_device_properties(q.device).multi_processor_count
    return q.shape[0], q.shape[1], k.shape[1], q.shape[2], DTYPES[q.dtype], multiprocessors


def _rows(layout: TrieLayout, q: Tensor, k: Tensor, streamed: int) -> Rows:
    """The schedule of forward or dQ, whose coarse kernel streams tiles of that many rows."""
    group = q.shape[1] // k.shape[1]
    fine = fine_is_cheaper(layout, (OWN_ROWS, streamed), (group + group % 2) / group)
    blocks = (FINE, FINE) if fine else (OWN_ROWS, streamed)
    schedule: BlockSchedule = layout.block_schedule(*blocks)
    return (
        fine,
        schedule.row_ptr.data_ptr(),
        schedule.full_end.data_ptr(),
        schedule.kv_blocks.data_ptr(),
        schedule.q_order.data_ptr(),
    )


def _columns(layout: TrieLayout, streamed: int) -> Columns:
    """The schedule of dK and dV, whose kernels stream tiles of that many rows."""
    coarse = layout.block_schedule(streamed, OWN_ROWS)  # its order is that of both kernels
    fine = fine_is_cheaper(layout, (streamed, OWN_ROWS))
    q_range = _even_ranges(layout) if fine else coarse.q_range
    return fine, q_range.data_ptr(), coarse.kv_order.data_ptr()


def _even_ranges(layout: TrieLayout) -> Tensor:
    """q_range of blocks of 64 x 64, with an empty one at the end of an odd number of them."""
    if "even_ranges" not in layout.memo:
        ranges = layout.block_schedule(FINE, FINE).q_range
        layout.memo["even_ranges"] = F.pad(ranges, (0, 0, 0, len(ranges) % 2))
    return layout.memo["even_ranges"]
