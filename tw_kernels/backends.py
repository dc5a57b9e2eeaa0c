"""Which backends an op has, and which of them can run here."""

import torch

from tw_kernels.attention.op import TRIE_ATTENTION
from tw_kernels.decode.op import TRIE_DECODE
from tw_kernels.decode.plan import PagedKV


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
