"""trie_decode in CUDA C++ on Hopper GPUs (csrc/cuda/decode/trie_decode.h).

Only taken by name (backend="cuda" or TW_DECODE_BACKEND=cuda). Nothing here waits for the device,
and grids and buffers follow from the plan's capacity, so a call can be captured in a CUDA graph
(by CUDA 12.3 or later, whose graphs have launches that begin early) and replayed on a plan that
another was copied into. A NaN in a key or value that one row of an item sees can reach rows beside
it that do not, as in any flash attention; what no row sees does not matter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tw_kernels import _C, cuda_build, cuda_device
from tw_kernels.decode.plan import DecodePlan, PagedKV
from tw_kernels.native import DTYPES, pages, plan_arrays, strided
from tw_kernels.scores import NO_OPTIONS, ScoreOptions

CUBIN = cuda_build.CUBINS / "trie_decode.cubin"
CAN_BE_CAPTURED = True


def why_not(q: Tensor, kv: PagedKV, options: ScoreOptions = NO_OPTIONS) -> str | None:
    """None if this call can run, else the reason in one line."""
    if lacking := [name for name, value in options._asdict().items() if value is not None]:
        return f"the CUDA kernels have no {' and no '.join(lacking)}"
    if reason := cuda_device.why_not(q):
        return reason
    if q.dtype not in DTYPES:
        return f"the CUDA kernels take bfloat16 and float16, not {q.dtype}"
    refusal = _C.cuda_trie_decode_refusal(_sizes(q, kv), DTYPES[q.dtype], pages(kv))
    return refusal or cuda_device.why_not_built(CUBIN)


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
    q = _with_aligned_rows(q)
    new_k = None if new_k is None else _with_aligned_rows(new_k)
    new_v = None if new_v is None else _with_aligned_rows(new_v)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    # Rounded to the dtype of q, partial results add less to the error than the probabilities, which
    # the tensor cores take so, do already; the weights of the merge stay in float32.
    partial_out = torch.empty(plan.capacity.slots, *q.shape[1:], dtype=q.dtype, device=q.device)
    partial_lse = torch.empty(partial_out.shape[:2], dtype=torch.float32, device=q.device)
    next_unit = torch.empty(1, dtype=torch.int32, device=q.device)
    _C.cuda_trie_decode(
        _sizes(q, kv, plan),
        DTYPES[q.dtype],
        scale,
        cuda_device.place(q, CUBIN),
        plan_arrays(plan),
        strided(q),
        pages(kv),
        strided(new_k),
        strided(new_v),
        tuple(x.data_ptr() for x in (out, partial_out, partial_lse, next_unit)),
    )
    return out


def _with_aligned_rows(x: Tensor) -> Tensor:
    """x if the kernels can read the rows of its heads 16 bytes at a time, else a copy."""
    per_16_bytes = 16 // x.itemsize
    aligned = x.data_ptr() % 16 == 0 and all(s % per_16_bytes == 0 for s in x.stride()[:2])
    return x if aligned and x.stride(2) == 1 else x.clone(memory_format=torch.contiguous_format)


Sizes = tuple[int, int, int, int, int, int, int, int, int]


def _sizes(q: Tensor, kv: PagedKV, plan: DecodePlan | None = None) -> Sizes:
    """Rows, items, tile rows, multiprocessors, heads, KV heads, head dim, pages, page size."""
    rows, heads, head_dim = q.shape
    num_pages, page_size, kv_heads, _ = kv.k_pages.shape
    items, tile_rows, multiprocessors = 0, 0, 0
    if plan is not None:
        items, tile_rows = plan.capacity.items, plan.tile_rows
        multiprocessors = torch.cuda.get_device_properties(q.device).multi_processor_count
    return (
        *(rows, items, tile_rows, multiprocessors),
        *(heads, kv_heads, head_dim, num_pages, page_size),
    )
