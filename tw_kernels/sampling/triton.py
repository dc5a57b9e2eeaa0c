"""sample_tokens in Triton; its kernels are in triton_kernels.py.

Triton is imported by the first call that needs it. On a CPU the kernels run in Triton's
interpreter, which must be on (TRITON_INTERPRET=1) before anything imports triton.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tw_kernels import triton_device
from tw_kernels.native import dense_rows
from tw_kernels.sampling.rows import SamplingRows
from tw_kernels.triton_device import launch

CHUNK = 4096  # logits of a program: 152,000 make 38 a row
CUT_BLOCK = 4096  # that a program of `cut` reads at a time; twice as many spill registers
WARPS, CUT_WARPS = 8, 16


def why_not(logits: Tensor) -> str | None:
    """None if this call can run, else the reason in one line."""
    if logits.dtype not in triton_device.DTYPES:
        return f"{logits.dtype} is not one of {', '.join(map(str, triton_device.DTYPES))}"
    return triton_device.why_no_triton(logits.device)


def forward(logits: Tensor, rows: SamplingRows, points: Tensor | None) -> Tensor:
    """Packed draws, int32 [S, 3]."""
    from tw_kernels.sampling import triton_kernels as kernels

    logits = dense_rows(logits)
    count, vocabulary = logits.shape
    device = logits.device
    out = torch.empty(count, 3, dtype=torch.int32, device=device)
    chunks = -(-vocabulary // CHUNK)
    largest, norms = torch.empty(2, count, chunks, device=device)
    masses = torch.empty(count, chunks, dtype=torch.int64, device=device)
    cuts = torch.empty(count, 2, dtype=torch.int64, device=device)
    stride = logits.stride(0)
    sizes: dict[str, Any] = {"V": vocabulary, "CHUNKS": chunks, "enable_fp_fusion": False}
    of_row = sizes | {"BLOCK_CHUNKS": 1 << (chunks - 1).bit_length()}
    parts = {"CHUNK": CHUNK, "num_warps": WARPS}
    pick = of_row | parts | {"TRUNCATES": rows.truncates}
    launch(kernels.largest_kernel, (chunks, count), logits, largest, stride, **sizes, **parts)
    if rows.truncates:
        cut = of_row | {"BLOCK": CUT_BLOCK, "num_warps": CUT_WARPS}
        launch(kernels.cut_kernel, (count,), logits, rows.data, largest, cuts, stride, **cut)
    sums = largest, cuts, masses, norms
    launch(kernels.weigh_kernel, (chunks, count), logits, rows.data, *sums, stride, **pick)
    launch(kernels.pick_kernel, (count,), logits, rows.data, points, *sums, out, stride, **pick)
    return out
