"""Tensors as the compiled kernels take them, which know no torch: addresses and strides.

Whoever passes an address keeps the tensor alive until the call, or the stream, is done with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tw_kernels.decode.plan import DecodePlan, PagedKV

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # Dtype of cpu/trie_attention.h
NOTHING = 0, 0, 0  # a `strided` of no tensor

Strided = tuple[int, int, int]
PlanArrays = tuple[int, int, int, int, int, int, int]
Pages = tuple[int, int, int, int, int]


def why_not(q: Tensor) -> str | None:
    """None if the CPU kernels (csrc/cpu) take q's device and dtype, else the reason in one line."""
    if q.device.type != "cpu":
        return f"the native kernels run on the CPU, not on {q.device.type}"
    if q.dtype not in DTYPES:
        return f"the native kernels take float32, bfloat16 and float16, not {q.dtype}"
    return None


def dense_rows(x: Tensor) -> Tensor:
    """x if each of its rows along the last dimension lies in one piece, else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strided(x: Tensor | None) -> Strided:
    """Address of x [rows, heads, D], strides of its rows and heads in elements; None: zeros."""
    return NOTHING if x is None else (x.data_ptr(), x.stride(0), x.stride(1))


def plan_arrays(plan: DecodePlan) -> PlanArrays:
    """Addresses of the arrays that say what a decode step reads and where it writes."""
    return (
        plan.rows.data_ptr(),
        plan.positions.data_ptr(),
        plan.slots.data_ptr(),
        plan.merge_ptr.data_ptr(),
        plan.merge_slots.data_ptr(),
        plan.items.data_ptr(),
        plan.pages.data_ptr(),
    )


def pages(kv: PagedKV) -> Pages:
    """Addresses of the pages of K and V, strides of pages, slots and heads in elements."""
    page_stride, slot_stride, head_stride, _ = kv.k_pages.stride()
    return kv.k_pages.data_ptr(), kv.v_pages.data_ptr(), page_stride, slot_stride, head_stride
