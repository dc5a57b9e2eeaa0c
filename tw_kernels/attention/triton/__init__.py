"""Trie attention in Triton.

    forward_kernel.py      out and lse
    backward_kernels.py    delta, dQ, dK with dV
    tuning.py              which block sizes, warps and stages each kernel runs with

Triton is imported by the first call that needs it: importing this module works without it.

Every value that a block of rows and columns shares is multiplied by a zero probability where the
trie or the window hides it, so a NaN or infinity in k, v or dout can reach rows that do not see it,
those of another trie of the pack too, as in any flash attention. It gets no further than the blocks
of rows that read its block, and finite values never do, not by one bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from tw_kernels import triton_device
from tw_kernels.native import dense_rows
from tw_kernels.trie import BlockSchedule, TrieLayout

if TYPE_CHECKING:
    from tw_kernels.attention.triton.forward_kernel import Config


class Plan(NamedTuple):
    """A trie and its window. Block sizes, and so schedules, depend on the call; the layout keeps
    them, and kernels of equal block sizes share one."""

    layout: TrieLayout
    window: int | None

    @property
    def mask(self) -> tuple[Tensor, Tensor | None]:
        """subtree_ends and, under a window, window_starts."""
        starts = None if self.window is None else self.layout.window_starts(self.window)
        return self.layout.subtree_ends, starts

    def schedule(self, config: Config) -> BlockSchedule:
        """For a kernel that runs with `config`."""
        return self.layout.block_schedule(config.block_q, config.block_kv, self.window)


def why_not(
    q: Tensor, k: Tensor, v: Tensor, window: int | None = None, softcap: float | None = None
) -> str | None:
    """None if this call can run, else the reason in one line."""
    return triton_device.why_not(q)


def plan(layout: TrieLayout, q: Tensor, window: int | None = None) -> Plan:
    """The plan of a trie under a window."""
    return Plan(layout, window)


def forward(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """out [N, Hq, D] in q's dtype and lse [Hq, N], float32.

    scale is above 0, since the row maximum is taken before it is applied.
    """
    from tw_kernels.attention.triton import forward_kernel, tuning

    q, k, v = map(dense_rows, (q, k, v))
    config = tuning.configs_for(q, plan.window, softcap).forward
    schedule = plan.schedule(config)
    return forward_kernel.forward(q, k, v, *plan.mask, schedule, scale, softcap, config)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Plan,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq [N, Hq, D], dk and dv [N, Hkv, D] in the dtypes of q, k and v."""
    from tw_kernels.attention.triton import backward_kernels as kernels
    from tw_kernels.attention.triton import tuning

    configs = tuning.configs_for(q, plan.window, softcap)
    dout, q, k, v, out = map(dense_rows, (dout, q, k, v, out))
    lse2, delta = kernels.row_stats(dout, out, lse.contiguous())
    shared = dout, q, k, v, lse2, delta, *plan.mask
    dq = kernels.grad_q(*shared, plan.schedule(configs.dq), scale, softcap, configs.dq)
    dk, dv = kernels.grad_kv(*shared, plan.schedule(configs.dkv), scale, softcap, configs.dkv)
    return dq, dk, dv
