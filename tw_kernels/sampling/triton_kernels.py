"""The Triton kernels of sample_tokens: largest, cut, weigh, pick.

A row of logits is taken in chunks, a program each, so that few rows fill a GPU too: `largest` finds
the largest logit of each chunk, `weigh` the weight of what is kept in it. `pick`, a program a row,
finds the chunk that holds the point from the chunks' sums and reads that one alone again. Between
them, where some row truncates, `cut` finds the last kept token of each row by bisection over its
logits, which stay in the second cache.

All that decides on a token is in whole numbers, or in float32 operations that are rounded one by
one (enable_fp_fusion=False), as tw_kernels/sampling/op.py defines them; log-probabilities are not.
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


@triton.jit
def _uniform(key, position):
    """SplitMix64's output as a number in [0, 1)."""
    z = key.to(tl.uint64, bitcast=True)
    z += (position.to(tl.uint64, bitcast=True) + 1) * STEP
    z = (z ^ (z >> 30)) * MIX1
    z = (z ^ (z >> 27)) * MIX2
    z = z ^ (z >> 31)
    return (z >> 12).to(tl.int64, bitcast=True).to(tl.float64) * (1.0 / 4503599627370496.0)


@triton.jit
def _weights(d):
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
def _tempered(x, divisor, largest):
    """x divided by the temperature, relative to the row's largest."""
    cold = divisor < COLD
    t = tl.div_rn(tl.where(cold, x - largest, x), divisor + tl.zeros_like(x))
    m = tl.div_rn(tl.where(cold, 0.0, largest), divisor)
    return t, t - m


@triton.jit
def _order(t):
    """int32 that orders as the numbers do, -0 with 0."""
    bits = tl.where(t == 0.0, 0.0, t).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _is_kept(t, ids, last_key, last_id):
    """Whether tokens do not come after the last one that is kept."""
    key = _order(t)
    return (key > last_key) | ((key == last_key) & (ids <= last_id))


@triton.jit
def _row_largest(largest, row, CHUNKS: tl.constexpr, BLOCK_CHUNKS: tl.constexpr):
    """The largest of each chunk, of the row, and whether the row is no distribution."""
    chunks = tl.arange(0, BLOCK_CHUNKS)
    each = tl.load(largest + row * CHUNKS + chunks, chunks < CHUNKS, other=-float("inf"))
    most = tl.max(each)
    bad = (tl.max((each != each).to(tl.int32)) > 0) | (most == -float("inf"))
    return each, most, bad | (most == float("inf"))


@triton.jit
def _divisor(row_data):
    """The temperature, 1 in rows that take the likeliest, and whether this one does."""
    divisor = tl.load(row_data + TEMPERATURE).to(tl.int32).to(tl.float32, bitcast=True)
    greedy = divisor == 0.0
    return tl.where(greedy, 1.0, divisor), greedy


@triton.jit
def largest_kernel(
    logits, largest, stride, V: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr
):
    """One program per chunk and row: its largest logit; NaN if it holds one."""
    row, chunk = tl.program_id(1).to(tl.int64), tl.program_id(0)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + row * stride + ids, ids < V, other=-float("inf")).to(tl.float32)
    has_nan = tl.max((x != x).to(tl.int32)) > 0
    tl.store(largest + row * CHUNKS + chunk, tl.where(has_nan, float("nan"), tl.max(x)))


@triton.jit
def _amount(
    x_row, divisor, most, least_key, last_key, last_id, V: tl.constexpr, BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
):  # fmt: skip
    """How many tokens of at least a key there are, or their weight, up to the last kept one."""
    total = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, V, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        x = tl.load(x_row + ids, ids < V, other=-float("inf")).to(tl.float32)
        t, d = _tempered(x, divisor, most)
        counts = (_order(t) >= least_key) & _is_kept(t, ids, last_key, last_id) & (ids < V)
        if COUNT:
            total += counts.to(tl.int64)
        else:
            total += tl.where(counts, _weights(d), 0)
    return tl.sum(total)


@triton.jit
def _cut(
    x_row, divisor, most, target, last_key, last_id, V: tl.constexpr, BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
):  # fmt: skip
    """The last token, as key and id, of the fewest first ones whose amounts reach the target.

    Invariant: tokens of keys >= low reach it, those of keys >= high do not.
    """
    low = tl.full((), -2139095041, tl.int64)  # the key of -inf
    first, _ = _tempered(most, divisor, most)  # pyright: ignore[reportGeneralTypeIssues]
    high = _order(first).to(tl.int64) + 1
    while high - low > 1:
        middle = (low + high) >> 1
        amount = _amount(x_row, divisor, most, middle, last_key, last_id, V, BLOCK, COUNT)
        low = tl.where(amount >= target, middle, low)
        high = tl.where(amount >= target, high, middle)
    # Of the tokens of this key, all of one weight, as many as it takes, by id.
    above = _amount(x_row, divisor, most, low + 1, last_key, last_id, V, BLOCK, COUNT)
    before = tl.full((), 0, tl.int64)
    last = tl.full((), V, tl.int64)
    for start in range(0, V, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        x = tl.load(x_row + ids, ids < V, other=-float("inf")).to(tl.float32)
        t, d = _tempered(x, divisor, most)
        equal = (_order(t) == low) & (ids < V)
        amounts = tl.where(equal, tl.full((BLOCK,), 1, tl.int64) if COUNT else _weights(d), 0)
        reached = equal & (above + before + tl.cumsum(amounts, 0) >= target)
        last = tl.minimum(last, tl.min(tl.where(reached, ids, V)))
        before += tl.sum(amounts)
    return low, last


@triton.jit
def cut_kernel(
    logits, data, largest, cuts, stride, V: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row: the last token that top_k and top_p keep, as key and id [S, 2]."""
    row = tl.program_id(0).to(tl.int64)
    row_data = data + row * COLUMNS
    divisor, greedy = _divisor(row_data)  # pyright: ignore[reportGeneralTypeIssues]
    _, most, bad = _row_largest(largest, row, CHUNKS, BLOCK_CHUNKS)
    top_k = tl.load(row_data + TOP_K)
    top_p = tl.load(row_data + TOP_P).to(tl.float64, bitcast=True)
    x_row = logits + row * stride
    key = tl.full((), -2147483648, tl.int64)  # below all
    last = tl.full((), V, tl.int64)
    truncates = (greedy == 0) & (bad == 0)
    if truncates & (top_k > 0) & (top_k < V):
        key, last = _cut(x_row, divisor, most, top_k, key, last, V, BLOCK, True)
    if truncates & (top_p < 1.0):
        mass = _amount(x_row, divisor, most, key, key, last, V, BLOCK, False)
        target = tl.maximum(tl.ceil(mass.to(tl.float64) * top_p).to(tl.int64), 1)
        key, last = _cut(x_row, divisor, most, target, key, last, V, BLOCK, False)
    tl.store(cuts + row * 2, key)
    tl.store(cuts + row * 2 + 1, last)


@triton.jit
def _kept_weights(x, ids, inside, row, row_data, cuts, divisor, most, TRUNCATES: tl.constexpr):
    """The weights of tokens, 0 of those that are cut off."""
    t, d = _tempered(x, divisor, most)  # pyright: ignore[reportGeneralTypeIssues]
    w = tl.where(inside, _weights(d), 0)
    if TRUNCATES:
        kept = _is_kept(t, ids, tl.load(cuts + row * 2), tl.load(cuts + row * 2 + 1))
        w = tl.where(kept & (w >= tl.load(row_data + MIN_WEIGHT)), w, 0)
    return w


@triton.jit
def weigh_kernel(
    logits, data, largest, cuts, masses, norms, stride, V: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr, CHUNK: tl.constexpr, TRUNCATES: tl.constexpr,
):  # fmt: skip
    """One program per chunk and row: the weight of what is kept, and the sum of exp(x - largest)
    of all, without temperature."""
    row, chunk = tl.program_id(1).to(tl.int64), tl.program_id(0)
    row_data = data + row * COLUMNS
    divisor, _ = _divisor(row_data)  # pyright: ignore[reportGeneralTypeIssues]
    _, most, _ = _row_largest(largest, row, CHUNKS, BLOCK_CHUNKS)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + row * stride + ids, ids < V, other=-float("inf")).to(tl.float32)
    w = _kept_weights(x, ids, ids < V, row, row_data, cuts, divisor, most, TRUNCATES)
    tl.store(masses + row * CHUNKS + chunk, tl.sum(w))
    tl.store(norms + row * CHUNKS + chunk, tl.sum(tl.exp(x - most)))


@triton.jit
def pick_kernel(
    logits, data, points, largest, cuts, masses, norms, out, stride, V: tl.constexpr,
    CHUNKS: tl.constexpr, BLOCK_CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
    TRUNCATES: tl.constexpr,
):  # fmt: skip
    """One program per row: its token and the bits of its log-probabilities, int32 [S, 3]."""
    row = tl.program_id(0).to(tl.int64)
    row_data = data + row * COLUMNS
    divisor, greedy = _divisor(row_data)  # pyright: ignore[reportGeneralTypeIssues]
    each, most, bad = _row_largest(largest, row, CHUNKS, BLOCK_CHUNKS)
    chunks = tl.arange(0, BLOCK_CHUNKS)
    mass = tl.load(masses + row * CHUNKS + chunks, chunks < CHUNKS, other=0)
    total = tl.sum(mass)
    if points is None:
        u = _uniform(tl.load(row_data + KEY), tl.load(row_data + POSITION))
    else:
        u = tl.load(points + row)
    point = (total.to(tl.float64) * u).to(tl.int64)
    drawn = tl.sum((tl.cumsum(mass, 0) <= point).to(tl.int32))
    likeliest = tl.min(tl.where(each == most, chunks, CHUNKS))
    chunk = tl.minimum(tl.where(greedy, likeliest, drawn), CHUNKS - 1)
    point -= tl.sum(tl.where(chunks < chunk, mass, 0))
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + row * stride + ids, ids < V, other=-float("inf")).to(tl.float32)
    w = _kept_weights(x, ids, ids < V, row, row_data, cuts, divisor, most, TRUNCATES)
    drawn = chunk * CHUNK + tl.sum((tl.cumsum(w, 0) <= point).to(tl.int32))
    likeliest = tl.min(tl.where((x == most) & (ids < V), ids, V))
    forced = tl.load(row_data + FORCED).to(tl.int32)
    token = tl.where(forced >= 0, forced, tl.where(greedy, likeliest, drawn))
    token = tl.where(bad & (forced < 0), 0, tl.minimum(token, V - 1))

    chosen = tl.load(logits + row * stride + token).to(tl.float32)
    norm = tl.sum(tl.load(norms + row * CHUNKS + chunks, chunks < CHUNKS, other=0.0))
    logprob = tl.where(bad, float("nan"), chosen - most - tl.log(norm))
    t, d = _tempered(chosen, divisor, most)
    sampled = d - tl.log(total.to(tl.float32) / WHOLE)
    if TRUNCATES:
        kept = _is_kept(t, token, tl.load(cuts + row * 2), tl.load(cuts + row * 2 + 1))
        kept = kept & (_weights(d) >= tl.load(row_data + MIN_WEIGHT))
        sampled = tl.where(kept, sampled, -float("inf"))
    else:
        sampled = tl.where(divisor == 1.0, logprob, sampled)
    sampled = tl.where(greedy, 0.0, sampled)
    tl.store(out + row * 3, token)
    tl.store(out + row * 3 + 1, logprob.to(tl.int32, bitcast=True))
    tl.store(out + row * 3 + 2, sampled.to(tl.int32, bitcast=True))
