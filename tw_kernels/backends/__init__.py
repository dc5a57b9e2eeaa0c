"""Implementations of the ops, one module each.

A trie-attention backend is a module with four functions:

    why_not(q, k, v)                                  None if it can run this call, else the reason
    plan(layout, q)                                   tensors that depend on the trie alone
    forward(q, k, v, plan, scale)                     -> out, lse
    backward(dout, q, k, v, out, lse, plan, scale)    -> dq, dk, dv

`dense` and `segments` also say what a call costs: work(layout) -> (pairs computed, library calls).
Shapes: q, out, dout, dq [N, Hq, D]; k, v, dk, dv [N, Hkv, D]; lse [Hq, N] (natural logarithm,
float32, or float64 for float64 inputs). A plan that costs something
to build is kept in `layout.memo`, so it is built once per trie.
"""

from types import ModuleType

import torch

from tw_kernels.backends import dense, segments, triton_attention

# In the order in which an accelerator prefers them.
TRIE_ATTENTION: dict[str, ModuleType] = {
    "triton": triton_attention,
    "segments": segments,
    "dense": dense,
}


def backends(op: str) -> dict[str, str | None]:
    """Every backend of an op: None if it can run here (bfloat16, head dim 64), else the reason.

    Raises:
        ValueError: no op of that name.
    """
    if op != "trie_attention":
        raise ValueError(f"no op {op!r}: trie_attention")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q = torch.empty(1, 1, 64, dtype=torch.bfloat16, device=device)
    return {name: backend.why_not(q, q, q) for name, backend in TRIE_ATTENTION.items()}
