"""What the Triton kernels of sample_tokens have in common: the arithmetic of its definition, and
how they read a row's settings.

All that decides on a token is in whole numbers, or in float32 operations that are rounded one by
one (enable_fp_fusion=False), as tw_kernels/sampling/op.py defines them.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from tw_kernels import triton_interpreter  # noqa: F401 (repairs the interpreter, if it is on)
from tw_kernels.sampling.rows import COLD as _COLD
from tw_kernels.sampling.rows import MIX1 as _MIX1
from tw_kernels.sampling.rows import MIX2 as _MIX2
from tw_kernels.sampling.rows import STEP as _STEP
from tw_kernels.sampling.rows import WHOLE as _WHOLE
from tw_kernels.sampling.rows import Column

COLD, WHOLE = tl.constexpr(_COLD), tl.constexpr(float(_WHOLE))
STEP, MIX1, MIX2 = (tl.constexpr(x) for x in (_STEP, _MIX1, _MIX2))
LOG2E, LN2_HIGH = tl.constexpr(math.log2(math.e)), tl.constexpr(0.693359375)
LN2_LOW = tl.constexpr(-2.12194440e-4)
MAGIC = tl.constexpr(1.5 * 2**23)  # added to x, it leaves x as a whole number
COLUMNS = tl.constexpr(len(Column))
KEY, POSITION, FORCED, TEMPERATURE, TOP_K, TOP_P, MIN_WEIGHT = (
    tl.constexpr(int(c)) for c in Column
)
# How many differences to the row's largest `weigh` adds weights up for, where top_p alone cuts it.
LEVELS = tl.constexpr(8)


@triton.jit
def random_number(points, row, row_data):
    """In [0, 1): the given one, or SplitMix64's output at the row's key and position."""
    if points is None:
        z = tl.load(row_data + KEY).to(tl.uint64, bitcast=True)
        z += (tl.load(row_data + POSITION).to(tl.uint64, bitcast=True) + 1) * STEP
        z = (z ^ (z >> 30)) * MIX1
        z = (z ^ (z >> 27)) * MIX2
        z = z ^ (z >> 31)
        u = (z >> 12).to(tl.int64, bitcast=True).to(tl.float64) * (1.0 / 4503599627370496.0)
    else:
        u = tl.load(points + row)
    return u


@triton.jit
def weights(d):
    """round(2^40 exp(d)) for d <= 0; 0 for a NaN."""
    x = tl.where(d > -29.0, d, -29.0)
    n = (x * LOG2E + MAGIC) - MAGIC
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    y = r * 1.9875691500e-4 + 1.3981999507e-3
    y = y * r + 8.3334519073e-3
    y = y * r + 4.1665795894e-2
    y = y * r + 1.6666665459e-1
    y = y * r + 5.0000001201e-1
    y = y * (r * r) + r + 1.0
    shift = -(n.to(tl.int32)).to(tl.int64)
    fraction = (y * 16777216.0).to(tl.int32).to(tl.int64) << 16
    one = tl.full(shift.shape, 1, tl.int64)
    return (fraction + ((one << shift) >> 1)) >> shift


@triton.jit
def level(i):
    """The i-th level of LEVELS, as a difference to the row's largest tempered logit."""
    return -tl.where(i < LEVELS - 1, 2 * i + 2, 29).to(tl.float32)


@triton.jit
def tempered(x, divisor, largest):
    """x divided by the temperature, and that relative to the row's largest."""
    cold = divisor < COLD
    t = tl.div_rn(tl.where(cold, x - largest, x), divisor + tl.zeros_like(x))
    m = tl.div_rn(tl.where(cold, 0.0, largest), divisor)
    return t, t - m


@triton.jit
def order(t):
    """int32 that orders as the numbers do, -0 with 0."""
    bits = tl.where(t == 0.0, 0.0, t).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def is_kept(key, ids, last_key, last_id):
    """Whether tokens do not come after the last one that is kept."""
    return (key > last_key) | ((key == last_key) & (ids <= last_id))


@triton.jit
def row_largest(largest, row, CHUNKS: tl.constexpr, BLOCK_CHUNKS: tl.constexpr):
    """The largest of each chunk, of the row, and whether the row is no distribution."""
    chunks = tl.arange(0, BLOCK_CHUNKS)
    each = tl.load(largest + row * CHUNKS + chunks, chunks < CHUNKS, other=-float("inf"))
    most = tl.max(each)
    bad = (tl.max((each != each).to(tl.int32)) > 0) | (most == -float("inf"))
    return each, most, bad | (most == float("inf"))


@triton.jit
def temperature(row_data):
    """The temperature, 1 in rows that take the likeliest, and whether this one does."""
    divisor = tl.load(row_data + TEMPERATURE).to(tl.int32).to(tl.float32, bitcast=True)
    greedy = divisor == 0.0
    return tl.where(greedy, 1.0, divisor), greedy


@triton.jit
def truncation(row_data, V: tl.constexpr):
    """top_k, 0 where it keeps all tokens, and top_p."""
    top_k = tl.load(row_data + TOP_K)
    top_p = tl.load(row_data + TOP_P).to(tl.float64, bitcast=True)
    return tl.where(top_k < V, top_k, 0), top_p
