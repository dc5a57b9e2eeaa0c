"""trie_decode in Triton; its kernels are in triton_kernels.py.

Triton is imported by the first call that needs it. On a CPU the kernels run in Triton's
interpreter, which must be on (TRITON_INTERPRET=1) before anything imports triton.

Nothing here waits for the device, and every grid and buffer follows from the plan's capacity and
the shapes alone, so a call can be captured in a CUDA graph and replayed on a plan that another was
copied into. A NaN in a key or value that one row of an item sees can reach rows beside it that do
not, as in any flash attention; finite values never do. Of an item nothing is read before the first
key and after the last one that a row of it sees, so without a window nothing that no row sees.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tw_kernels import triton_device
from tw_kernels.decode.plan import DecodePlan, PagedKV
from tw_kernels.native import dense_rows
from tw_kernels.scores import NO_OPTIONS, ScoreOptions

PAGE_SIZES = (8, 16, 32, 64, 128, 256)
CAN_BE_CAPTURED = True


def why_not(q: Tensor, kv: PagedKV, options: ScoreOptions = NO_OPTIONS) -> str | None:
    """None if this call can run, else the reason in one line."""
    if kv.page_size not in PAGE_SIZES:
        return f"page size {kv.page_size} is not one of {', '.join(map(str, PAGE_SIZES))}"
    return triton_device.why_not(q)


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
    from tw_kernels.decode import triton_kernels as kernels

    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if new_k is not None and new_v is not None:
        kernels.write(kv, plan, dense_rows(new_k), dense_rows(new_v))
    parts = kernels.partial(dense_rows(q), kv, plan, scale, options)
    kernels.merge(plan, *parts, options, out)
    return out
