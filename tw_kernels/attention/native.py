"""Trie attention in one compiled call a pass, for small tries on a CPU (csrc/cpu).

It computes what the trie makes visible, rounded up to tiles of 32 rows (fewer on processors without
AVX-512), in float32 whatever the dtype, on as many threads as torch.get_num_threads(). The
environment variable TW_CPU (avx512bf16, avx512, avx2 or portable) forces an instruction set.
"""

import torch
from torch import Tensor

from tw_kernels import _C
from tw_kernels.native import DTYPES, Strided, strided
from tw_kernels.trie import TrieLayout

Sizes = tuple[int, int, int, int]  # tokens, heads, KV heads, head dim


def why_not(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    if q.device.type != "cpu":
        return f"the native kernels run on the CPU, not on {q.device.type}"
    if q.dtype not in DTYPES:
        return f"the native kernels take float32, bfloat16 and float16, not {q.dtype}"
    return None


def plan(layout: TrieLayout, q: Tensor) -> list[Tensor]:
    """One tensor, int32 [N] on the CPU: the subtree ends themselves."""
    return [layout.subtree_ends.contiguous()]


def forward(
    q: Tensor, k: Tensor, v: Tensor, plan: list[Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    q, k, v = (_with_dense_rows(x) for x in (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32)
    _C.trie_attention_forward(*_arguments(q, k, v, out, lse, plan, scale))
    return out, lse


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
    dout, q, k, v = (_with_dense_rows(x) for x in (dout, q, k, v))
    out, lse = out.contiguous(), lse.contiguous()
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    arguments = _arguments(q, k, v, out, lse, plan, scale)
    grads = dq.data_ptr(), dk.data_ptr(), dv.data_ptr()
    _C.trie_attention_backward(*arguments, strided(dout), *grads)
    return dq, dk, dv


def _with_dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def _arguments(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: list[Tensor], scale: float
) -> tuple[Sizes, int, float, int, int, Strided, Strided, Strided, int, int]:
    """What both passes take first."""
    n, heads, head_dim = q.shape
    return (
        (n, heads, k.shape[1], head_dim),
        DTYPES[q.dtype],
        scale,
        torch.get_num_threads(),
        plan[0].data_ptr(),
        strided(q),
        strided(k),
        strided(v),
        out.data_ptr(),
        lse.data_ptr(),
    )
