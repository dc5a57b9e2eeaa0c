"""trie_attention in CUDA C++ on Hopper GPUs (csrc/cuda/attention/trie_attention.h).

Only taken by name (backend="cuda" or TW_BACKEND=cuda). bfloat16, head dims 64 and 128; no windows
and no soft caps. Nothing here waits for the device. Each gradient is summed in a fixed order: two
runs agree to the last bit.

What a block of rows and columns shares is multiplied by a zero probability where the trie hides it:
a NaN or infinity in k, v or dout can reach rows that do not see it, as in any flash attention.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tw_kernels import _C, cuda_build, cuda_device
from tw_kernels.trie import BlockSchedule, TrieLayout

# Of csrc/cuda/attention/index.h: rows or columns that a thread block owns, to a multiple of
# which subtree_ends is padded too; and by head dim the rows of the tiles that stream past them in
# forward, dQ, and dK with dV.
OWN_ROWS = 128
STREAMED_ROWS = {64: (128, 128, 64), 128: (128, 64, 64)}

FORWARD_CUBIN = cuda_build.CUBINS / "trie_attention_fwd.cubin"
BACKWARD_CUBIN = cuda_build.CUBINS / "trie_attention_bwd.cubin"


class Plan(NamedTuple):
    """subtree_ends padded with zeros to a multiple of OWN_ROWS, and the schedule of each kernel."""

    ends: Tensor
    forward: BlockSchedule
    dq: BlockSchedule
    dkv: BlockSchedule


def why_not(
    q: Tensor, k: Tensor, v: Tensor, window: int | None = None, softcap: float | None = None
) -> str | None:
    """None if this call can run, else the reason in one line."""
    if window is not None or softcap is not None:
        return "the CUDA kernels have no window and no soft cap"
    if reason := cuda_device.why_not(q):
        return reason
    if q.dtype != torch.bfloat16:
        return f"the CUDA kernels take bfloat16, not {q.dtype}"
    if q.shape[-1] not in STREAMED_ROWS:
        return f"the CUDA kernels take head dims 64 and 128, not {q.shape[-1]}"
    return cuda_device.why_not_built(FORWARD_CUBIN, BACKWARD_CUBIN)


def plan(layout: TrieLayout, q: Tensor, window: None = None) -> Plan:
    """The plan for q's head dim. The layout keeps its parts; kernels of equal block sizes share a
    schedule."""
    if "padded_ends" not in layout.memo:
        missing = -layout.num_tokens % OWN_ROWS
        layout.memo["padded_ends"] = F.pad(layout.subtree_ends, (0, missing))
    forward, dq, dkv = STREAMED_ROWS[q.shape[-1]]
    return Plan(
        layout.memo["padded_ends"],
        layout.block_schedule(OWN_ROWS, forward),
        layout.block_schedule(OWN_ROWS, dq),
        layout.block_schedule(dkv, OWN_ROWS),
    )


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
        _rows(plan.forward),
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
        _rows(plan.dq),
        _columns(plan.dkv),
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


def _sizes(q: Tensor, k: Tensor) -> tuple[int, int, int, int, int]:
    """Tokens, heads, KV heads, head dim, multiprocessors of the device."""
    multiprocessors = torch.cuda.get_device_properties(q.device).multi_processor_count
    return q.shape[0], q.shape[1], k.shape[1], q.shape[2], multiprocessors


def _rows(schedule: BlockSchedule) -> tuple[int, int, int, int]:
    return (
        schedule.row_ptr.data_ptr(),
        schedule.full_end.data_ptr(),
        schedule.kv_blocks.data_ptr(),
        schedule.q_order.data_ptr(),
    )


def _columns(schedule: BlockSchedule) -> tuple[int, int]:
    return schedule.q_range.data_ptr(), schedule.kv_order.data_ptr()
