"""Trie attention in Triton: the door to the kernels and their tuning.

    triton_attention_fwd.py     forward kernel
    triton_attention_bwd.py     delta, dQ, dK with dV
    triton_attention_tuning.py  which block sizes, warps and stages each kernel runs with
    triton_interpreter.py       whether Triton's interpreter is on, and its repairs

Triton is imported by the first call that needs it: importing this module costs nothing and works
where Triton is not installed. On a CPU the kernels run in Triton's interpreter, which must be on
(TRITON_INTERPRET=1) before anything imports triton.

Every value that a block of rows and columns shares is multiplied by a zero probability where the
trie hides it, so a NaN or infinity in k, v or dout can reach rows that do not see it, as in any
flash attention. Finite values never do, not by one bit.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

from tw_kernels.trie import BlockSchedule, TrieLayout

HEAD_DIMS = (16, 32, 64, 128, 256)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_CAPABILITY = (8, 0)  # bfloat16 in the tensor cores and asynchronous copies

_FIELDS = len(BlockSchedule._fields)


@cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def why_not(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """None if this call can run, else the reason in one line."""
    if not _is_installed():
        return "triton is not installed: pip install 'threadweaver[triton]'"
    if q.shape[-1] not in HEAD_DIMS:
        return f"head dim {q.shape[-1]} is not one of {', '.join(map(str, HEAD_DIMS))}"
    if q.dtype not in DTYPES:
        return f"{q.dtype} is not one of {', '.join(map(str, DTYPES))}"
    if q.device.type == "cuda":
        capability = torch.cuda.get_device_capability(q.device)
        if capability < MIN_CAPABILITY:
            return f"needs a GPU of compute capability 8.0 or later, not {capability}"
        return None
    from tw_kernels import triton_interpreter

    if q.device.type == "cpu" and triton_interpreter.is_on():
        return None
    return (
        f"needs a CUDA device, not {q.device.type}; "
        "on a CPU only with TRITON_INTERPRET=1 set before triton is imported"
    )


def plan(layout: TrieLayout, q: Tensor) -> list[Tensor]:
    """subtree_ends, then the fields of three schedules: forward, dQ, dK with dV.

    Each schedule is for the block sizes that its kernel runs with on q's device, head dim and
    dtype; the layout keeps them, so kernels of equal block sizes share one.
    """
    from tw_kernels.attention.triton import tuning

    schedules = (layout.block_schedule(c.block_q, c.block_kv) for c in tuning.configs_for(q))
    return [layout.subtree_ends, *(field for schedule in schedules for field in schedule)]


def forward(
    q: Tensor, k: Tensor, v: Tensor, plan: list[Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """out [N, Hq, D] in q's dtype and lse [Hq, N], float32.

    Raises:
        ValueError: scale is not positive (the row maximum is taken before the scale).
    """
    from tw_kernels.attention.triton import forward as fwd
    from tw_kernels.attention.triton import tuning

    if scale <= 0:
        raise ValueError(f"backend 'triton' needs a positive scale, not {scale}: use 'dense'")
    q, k, v = map(_rows_contiguous, (q, k, v))
    schedule = BlockSchedule(*plan[1 : 1 + _FIELDS])
    return fwd.forward(q, k, v, plan[0], schedule, scale, tuning.configs_for(q).forward)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: list[Tensor],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq [N, Hq, D], dk and dv [N, Hkv, D] in the dtypes of q, k and v."""
    from tw_kernels.attention.triton import backward as bwd
    from tw_kernels.attention.triton import tuning

    configs = tuning.configs_for(q)
    dout, q, k, v, out = map(_rows_contiguous, (dout, q, k, v, out))
    lse2, delta = bwd.row_stats(dout, out, lse.contiguous())
    dq_schedule = BlockSchedule(*plan[1 + _FIELDS : 1 + 2 * _FIELDS])
    dkv_schedule = BlockSchedule(*plan[1 + 2 * _FIELDS :])
    shared = dout, q, k, v, lse2, delta, plan[0]
    dq = bwd.grad_q(*shared, dq_schedule, scale, configs.dq)
    dk, dv = bwd.grad_kv(*shared, dkv_schedule, scale, configs.dkv)
    return dq, dk, dv


def _rows_contiguous(x: Tensor) -> Tensor:
    """x if each of its rows of D numbers lies in one piece, else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()
