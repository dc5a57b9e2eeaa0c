"""Trie attention in one compiled call a pass, for small tries on a CPU (csrc/cpu).

It computes what the trie makes visible, rounded up to tiles of 32 rows (fewer on processors without
AVX-512), in float32 whatever the dtype, on as many threads as torch.get_num_threads(). The
environment variable TW_CPU (avx512bf16, avx512, avx2 or portable) forces an instruction set.
"""

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
    if window is not None or softcap is not None:
        return "the native kernels have no window and no soft cap yet"
    return native.why_not(q)


def plan(layout: TrieLayout, q: Tensor, window: None = None) -> Tensor:
    """The subtree ends, int32 [N] on the CPU, contiguous."""
    return layout.subtree_ends.contiguous()


def forward(
    q: Tensor, k: Tensor, v: Tensor, subtree_ends: Tensor, scale: float, softcap: None = None
) -> tuple[Tensor, Tensor]:
    """out [N, Hq, D] in q's dtype and lse [Hq, N], float32."""
    q, k, v = (dense_rows(x) for x in (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32)
    _C.trie_attention_forward(*_arguments(q, k, v, out, lse, subtree_ends, scale))
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    subtree_ends: Tensor,
    scale: float,
    softcap: None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq [N, Hq, D], dk and dv [N, Hkv, D] in the dtypes of q, k and v."""
    dout, q, k, v = (dense_rows(x) for x in (dout, q, k, v))
    out, lse = out.contiguous(), lse.contiguous()
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    arguments = _arguments(q, k, v, out, lse, subtree_ends, scale)
    grads = dq.data_ptr(), dk.data_ptr(), dv.data_ptr()
    _C.trie_attention_backward(*arguments, strided(dout), *grads)
    return dq, dk, dv


def _arguments(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, subtree_ends: Tensor, scale: float
) -> tuple[Sizes, int, float, int, int, Strided, Strided, Strided, int, int]:
    """What both passes take first."""
    n, heads, head_dim = q.shape
    return (
        (n, heads, k.shape[1], head_dim),
        DTYPES[q.dtype],
        scale,
        torch.get_num_threads(),
        subtree_ends.data_ptr(),
        strided(q),
        strided(k),
        strided(v),
        out.data_ptr(),
        lse.data_ptr(),
    )
