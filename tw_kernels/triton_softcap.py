"""The hyperbolic tangent of soft-capped scores, for every Triton kernel that has them.

A soft-capped score is cap * tanh(scale * q k^T / cap), the mask aside.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

MINUS_2_LOG2E = tl.constexpr(-2 * math.log2(math.e))


@triton.jit
def tanh(x):
    """tanh of float32, +-1 for any large x, within a few 2^-24 of 1.

    (1 - e) / (1 + e) with e = exp(-2 |x|), which is in [0, 1]: no infinity can arise, and 1 - e is
    exact where it is small.
    """
    e = tl.exp2(tl.abs(x) * MINUS_2_LOG2E)
    y = (1 - e) / (1 + e)
    return tl.where(x < 0, -y, y)
