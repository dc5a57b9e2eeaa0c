"""Trie attention in one compiled call a pass, for small tries on a CPU (csrc/cpu).

It computes what the trie makes visible, rounded up to tiles of 32 rows (fewer on processors without
AVX-512), in float32 whatever the dtype, on as many threads as torch.get_num_threads(). The
environment variable TW_CPU (avx512bf16, avx512, avx2 or portable) forces an instruction set.

A NaN or infinity reaches only what it should: rows that see its key or value, and gradients that
such a row is a term of.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tw_kernels import _C, native
from tw_kernels.native import DTYPES, Strided, dense_rows, strided
from tw_kernels.trie import TrieLayout

Sizes = tuple[int, int, int, int]  # tokens, heads, KV heads, head dim


def why_not(
    q: Tensor, k: Tensor, v: Tensor, window: int | None = None, softcap: float | None = None
) -> str | None:
    """None if this call can run, else the reason in one line."""
    return native.why_not(q)


class Plan(NamedTuple):
    """int32 [N] each, on the CPU, contiguous."""

    subtree_ends: Tensor
    window_starts: Tensor | None  # None: no window


def plan(layout: TrieLayout, q: Tensor, window: int | None = None) -> Plan:
    """What the layout holds."""
    starts = None if window is None else layout.window_starts(window)
    return Plan(layout.subtree_ends, starts)


def forward(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """out [N, Hq, D] in q's dtype and lse [Hq, N], float32."""
    q, k, v = (dense_rows(x) for x in (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32)
    _C.trie_attention_forward(*_arguments(q, k, v, out, lse, plan, scale, softcap))
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
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq [N, Hq, D], dk and dv [N, Hkv, D] in the dtypes of q, k and v."""
    dout, q, k, v = (dense_rows(x) for x in (dout, q, k, v))
    out, lse = out.contiguous(), lse.contiguous()
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    arguments = _arguments(q, k, v, out, lse, plan, scale, softcap)
    grads = dq.data_ptr(), dk.data_ptr(), dv.data_ptr()
    _C.trie_attention_backward(*arguments, strided(dout), *grads)
    return dq, dk, dv


def _arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Plan,
    scale: float,
    softcap: float | None,
) -> tuple[Sizes, int, float, float, int, tuple[int, int], Strided, Strided, Strided, int, int]:
    """What both passes take first."""
    n, heads, head_dim = q.shape
    starts = plan.window_starts
    return (
        (n, heads, k.shape[1], head_dim),
        DTYPES[q.dtype],
        scale,
        softcap or 0.0,
        torch.get_num_threads(),
        (plan.subtree_ends.data_ptr(), 0 if starts is None else starts.data_ptr()),
        strided(q),
        strided(k),
        strided(v),
        out.data_ptr(),
        lse.data_ptr(),
    )
