"""trie_decode in one compiled call on a CPU (csrc/cpu).

On as many threads as torch.get_num_threads(); the result does not depend on how many. In float32
whatever the dtype, but on processors with AVX512_BF16 the matrix products of bfloat16 calls take q,
keys and values as they are (subnormal ones as 0) and probabilities rounded to bfloat16. The
environment variable TW_CPU (avx512bf16, avx512, avx2 or portable) forces an instruction set. What
a row does not see has no effect on it, NaN and infinity included.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tw_kernels import _C, native
from tw_kernels.decode.plan import DecodePlan, PagedKV
from tw_kernels.native import DTYPES, dense_rows, pages, plan_arrays, strided
from tw_kernels.scores import NO_OPTIONS, ScoreOptions

CAN_BE_CAPTURED = True  # on a CPU nothing is captured: a call that stands in for it runs again


def why_not(q: Tensor, kv: PagedKV, options: ScoreOptions = NO_OPTIONS) -> str | None:
    """None if this call can run, else the reason in one line."""
    return native.why_not(q)


def forward(
    q: Tensor,
    kv: PagedKV,
    plan: DecodePlan,
    scale: float,
    new_k: Tensor | None,
    new_v: Tensor | None,
    options: ScoreOptions,
) -> Tensor:
    """out [Q, Hq, D] in q's dtype; writes new_k and new_v to their slots first."""
    q = dense_rows(q)
    new_k = None if new_k is None else dense_rows(new_k)
    new_v = None if new_v is None else dense_rows(new_v)
    rows, heads, head_dim = q.shape
    slots, kv_heads = plan.capacity.slots, kv.k_pages.shape[2]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    _C.trie_decode(
        (rows, plan.size.items, slots, heads, kv_heads, head_dim, plan.page_size),
        DTYPES[q.dtype],
        scale,
        options.window or 0,
        options.softcap or 0.0,
        0 if options.sinks is None else options.sinks.data_ptr(),
        torch.get_num_threads(),
        plan_arrays(plan),
        strided(q),
        out.data_ptr(),
        pages(kv),
        strided(new_k),
        strided(new_v),
    )
    return out
