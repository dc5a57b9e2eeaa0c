"""sample_tokens in Triton; its kernels are in triton_kernels.py and triton_cut.py.

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
WARPS = 8
# Tokens whose largest logit `cut` looks at: a line of a cache in 16-bit numbers, and more where a
# program could not keep the largest of all groups in registers.
GROUP, MOST_GROUPS = 64, 4096
# Of a row, that `cut` lists: 128 KiB, less than half of 152,000 logits in bfloat16.
CANDIDATES = 16384
LIST_BLOCK = 1024  # of these that it reads at a time: seldom are there more


def why_not(logits: Tensor) -> str | None:
    """None if this call can run, else the reason in one line."""
    if logits.dtype not in triton_device.DTYPES:
        return f"{logits.dtype} is not one of {', '.join(map(str, triton_device.DTYPES))}"
    return triton_device.why_no_triton(logits.device)


def forward(logits: Tensor, rows: SamplingRows, points: Tensor | None) -> Tensor:
    """Packed draws, int32 [S, 3]."""
    from tw_kernels.sampling import triton_kernels as kernels

    logits = dense_rows(logits)
    data, stride, device = rows.data, logits.stride(0), logits.device
    count, vocabulary = logits.shape
    out = torch.empty(count, 3, dtype=torch.int32, device=device)
    chunks = -(-vocabulary // CHUNK)
    block_chunks = 1 << (chunks - 1).bit_length()
    group = max(GROUP, block_chunks * CHUNK // MOST_GROUPS)
    largest, norms = torch.empty(2, count, chunks, device=device)
    masses = torch.empty(count, chunks, dtype=torch.int64, device=device)
    of_groups = levels = cuts = None
    if rows.truncates:
        of_groups = torch.empty(count, chunks * CHUNK // group, device=device)
        shape = count, chunks, kernels.LEVELS.value
        levels = torch.empty(shape, dtype=torch.int64, device=device)
    sizes: dict[str, Any] = {"V": vocabulary, "CHUNKS": chunks, "enable_fp_fusion": False}
    of_row = sizes | {"BLOCK_CHUNKS": block_chunks}
    parts = {"CHUNK": CHUNK, "num_warps": WARPS}
    each = of_row | parts | {"TRUNCATES": rows.truncates}
    grid = chunks, count
    of_group = sizes | parts | {"GROUP": group}
    launch(kernels.largest_kernel, grid, logits, largest, of_groups, stride, **of_group)
    sums = masses, norms
    launch(kernels.weigh_kernel, grid, logits, data, largest, *sums, levels, stride, **each)
    if of_groups is not None and levels is not None:
        cuts = _cut(logits, data, points, largest, of_groups, levels, of_row | {"GROUP": group})
    found = largest, cuts, *sums, out
    launch(kernels.pick_kernel, (count,), logits, data, points, *found, stride, **each)
    return out


def _cut(
    logits: Tensor,
    data: Tensor,
    points: Tensor | None,
    largest: Tensor,
    of_groups: Tensor,
    levels: Tensor,
    sizes: dict[str, Any],
) -> Tensor:
    """What `cut` finds of each row, int64 [S, 4]."""
    from tw_kernels.sampling.triton_cut import cut_kernel

    count, vocabulary = logits.shape
    most = min(CANDIDATES, vocabulary)
    groups = torch.empty_like(of_groups, dtype=torch.int32)
    values = torch.empty(count, most, device=logits.device)
    ids = torch.empty_like(values, dtype=torch.int32)
    cuts = torch.empty(count, 4, dtype=torch.int64, device=logits.device)
    found = largest, of_groups, levels, groups, values, ids, cuts
    sizes = sizes | {"GROUPS": groups.shape[1], "CANDIDATES": most}
    sizes |= {"BLOCK_GROUPS": 1 << (groups.shape[1] - 1).bit_length()}
    sizes |= {"BLOCK": CHUNK, "LIST_BLOCK": LIST_BLOCK, "num_warps": WARPS}
    launch(cut_kernel, (count,), logits, data, points, *found, logits.stride(0), **sizes)
    return cuts
