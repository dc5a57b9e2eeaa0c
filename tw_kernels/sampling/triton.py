"""sample_tokens in Triton; its kernels are in triton_kernels.py.

Triton is imported by the first call that needs it. On a CPU the kernels run in Triton's
interpreter, which must be on (TRITON_INTERPRET=1) before anything imports triton.
"""

from __future__ import annotations

from torch import Tensor

from tw_kernels import triton_device
from tw_kernels.sampling.rows import SamplingRows


def why_not(logits: Tensor) -> str | None:
    """None if this call can run, else the reason in one line."""
    if logits.dtype not in triton_device.DTYPES:
        return f"{logits.dtype} is not one of {', '.join(map(str, triton_device.DTYPES))}"
    return triton_device.why_no_triton(logits.device)


def forward(logits: Tensor, rows: SamplingRows, points: Tensor | None) -> Tensor:
    """Packed draws, int32 [S, 3]."""
    from tw_kernels.sampling import triton_kernels

    return triton_kernels.sample(logits, rows, points)
