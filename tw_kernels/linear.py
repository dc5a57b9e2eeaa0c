"""few_row_linear: a float32 linear layer of few rows on a CPU, at the speed at which memory gives
its weights (csrc/cpu/linear.h).

What a decode step is made of besides attention. The libraries behind torch pack the weights for
every product of two rows and more, or cut it for many rows: reading the weights of SmolLM2-135M
takes 23 ms on two cores of an AMD EPYC with AVX2, and a step of four tokens took 102.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tw_kernels import _C

# Rows up to which it is faster than torch's product of large matrices: by 1.1 to 1.3 at 16 rows,
# 1.6 to 2 at 4, even at 24 (two Xeon cores held to AVX2, 1536 x 576 and 49152 x 576).
MOST_ROWS = 16


def few_row_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias; has no gradient.

    A row of the result does not depend on the other rows, nor on the number of threads, bit for
    bit. On as many threads as torch.get_num_threads(); the environment variable TW_CPU forces an
    instruction set, as for the other native kernels.

    Args:
        x: float32 [..., inputs], on the CPU.
        weight: float32 [outputs, inputs].
        bias: float32 [outputs], or None.

    Returns:
        float32 [..., outputs].

    Raises:
        ValueError: shapes that do not fit together, another dtype or device.
    """
    outputs, inputs = weight.shape
    if x.shape[-1] != inputs or not (bias is None or bias.shape == (outputs,)):
        shapes = [None if t is None else tuple(t.shape) for t in (x, weight, bias)]
        raise ValueError(
            "x must be [..., inputs], weight [outputs, inputs] and bias [outputs]; got "
            f"{', '.join(map(str, shapes))}"
        )
    for t in (x, weight) if bias is None else (x, weight, bias):
        if t.dtype is not torch.float32 or not t.is_cpu:
            raise ValueError(f"it takes float32 on the CPU, got {t.dtype} on {t.device}")
    x, weight = x.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    out = torch.empty(*x.shape[:-1], outputs)
    _C.few_row_linear(
        math.prod(x.shape[:-1]),
        inputs,
        outputs,
        torch.get_num_threads(),
        x.data_ptr(),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
    )
    return out
