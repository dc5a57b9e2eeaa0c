"""Trie attention in Triton.

    forward_kernel.py      out and lse
    backward_kernels.py    delta, dQ, dK with dV
    tuning.py              which block sizes, warps and stages each kernel runs with

Triton is imported by the first call that needs it: importing this module works without it.

Every value that a block of rows and columns shares is multiplied by a zero probability where the
trie hides it, so a NaN or infinity in k, v or dout can reach rows that do not see it, as in any
flash attention. Finite values never do, not by one bit.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from tw_kernels import triton_device
from tw_kernels.native import dense_rows
from tw_kernels.trie import BlockSchedule, TrieLayout


class Plan(NamedTuple):
    """The trie, and the schedule of each kernel for the block sizes that it runs with."""

    subtree_ends: Tensor
    forward: BlockSchedule
    dq: BlockSchedule
    dkv: BlockSchedule


def why_not(
    q: Tensor, k: Tensor, v: Tensor, window: int | None = None, softcap: float | None = None
) -> str | None:
    """None if this call can run, else the reason in one line."""
    if window is not None or softcap is not None:
        return "the Triton kernels have no window and no soft cap yet"
    return triton_device.why_not(q)


def plan(layout: TrieLayout, q: Tensor, window: None = None) -> Plan:
    """The plan for q's device, head dim and dtype.

    The layout keeps the schedules; kernels of equal block sizes share one.
    """
    from tw_kernels.attention.triton import tuning

    schedules = (layout.block_schedule(c.block_q, c.block_kv) for c in tuning.configs_for(q))
    return Plan(layout.subtree_ends, *schedules)


def forward(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, softcap: None = None
) -> tuple[Tensor, Tensor]:
    """out [N, Hq, D] in q's dtype and lse [Hq, N], float32.

    scale is above 0, since the row maximum is taken before it is applied.
    """
    from tw_kernels.attention.triton import forward_kernel, tuning

    q, k, v = map(dense_rows, (q, k, v))
    config = tuning.configs_for(q).forward
    return forward_kernel.forward(q, k, v, plan.subtree_ends, plan.forward, scale, config)


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
    from tw_kernels.attention.triton import backward_kernels as kernels
    from tw_kernels.attention.triton import tuning

    configs = tuning.configs_for(q)
    dout, q, k, v, out = map(dense_rows, (dout, q, k, v, out))
    lse2, delta = kernels.row_stats(dout, out, lse.contiguous())
    shared = dout, q, k, v, lse2, delta, plan.subtree_ends
    dq = kernels.grad_q(*shared, plan.dq, scale, configs.dq)
    dk, dv = kernels.grad_kv(*shared, plan.dkv, scale, configs.dkv)
    return dq, dk, dv
