"""Implementations of the ops, one module each.

A trie-attention backend is a module with four functions:

    why_not(q, k, v)                                  None if it can run this call, else the reason
    plan(layout, q)                                   tensors that depend on the trie alone
    forward(q, k, v, plan, scale)                     -> out, lse
    backward(dout, q, k, v, out, lse, plan, scale)    -> dq, dk, dv

Shapes: q, out, dout, dq [N, Hq, D]; k, v, dk, dv [N, Hkv, D]; lse [Hq, N] (natural logarithm,
float32, or float64 for float64 inputs). A plan that costs something to
build is kept in `layout.memo`, so it is built once per trie.

A trie-decode backend is a module with two:

    why_not(q, kv)                                    None if it can run this call, else the reason
    forward(q, kv, plan, scale, new_k, new_v)         -> out; new_k and new_v, tensors or None,
                                                      are written to their pages first
Shapes: q, out [Q, Hq, D]; new_k, new_v [Q, Hkv, D]; kv a PagedKV, plan a DecodePlan.
"""

from types import ModuleType

import torch

from tw_kernels.attention import cuda, dense, native, segments
from tw_kernels.attention.triton import backend as triton
from tw_kernels.decode import cuda as cuda_decode
from tw_kernels.decode import native as native_decode
from tw_kernels.decode import reference
from tw_kernels.decode import triton as triton_decode
from tw_kernels.decode.plan import PagedKV

TRIE_ATTENTION: dict[str, ModuleType] = {
    "native": native,
    "triton": triton,
    "segments": segments,
    "dense": dense,
    "cuda": cuda,
}

TRIE_DECODE: dict[str, ModuleType] = {
    "triton": triton_decode,
    "native": native_decode,
    "reference": reference,
    "cuda": cuda_decode,
}


def backends(op: str) -> dict[str, str | None]:
    """Every backend of an op: None if it can run here (bfloat16, head dim 64), else the reason.

    Raises:
        ValueError: no op of that name.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q = torch.empty(1, 1, 64, dtype=torch.bfloat16, device=device)
    if op == "trie_attention":
        return {name: backend.why_not(q, q, q) for name, backend in TRIE_ATTENTION.items()}
    if op == "trie_decode":
        pages = q.new_empty(1, 16, 1, 64)
        kv = PagedKV(pages, pages)
        return {name: backend.why_not(q, kv) for name, backend in TRIE_DECODE.items()}
    raise ValueError(f"no op {op!r}: trie_attention, trie_decode")
