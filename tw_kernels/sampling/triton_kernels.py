"""The Triton kernels of sample_tokens: largest, weigh, pick; where some row truncates, the one of
triton_cut.py runs before `pick`.

A row of logits is taken in chunks, a program each, so that few rows fill a GPU too: `largest` finds
the largest logit of each chunk, `weigh` its weight. `pick`, a program a row, finds the chunk that
holds the point from the chunks' sums and reads that one alone again; in a row that top_k or top_p
cuts it takes the token that `cut` has drawn. Log-probabilities decide on nothing and are floating
point.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tw_kernels.sampling.triton_arithmetic import (
    COLUMNS,
    FORCED,
    LEVELS,
    MIN_WEIGHT,
    WHOLE,
    is_kept,
    level,
    order,
    random_number,
    row_largest,
    temperature,
    tempered,
    truncation,
    weights,
)


@triton.jit
def largest_kernel(
    logits, largest, group_largest, stride, V: tl.constexpr, CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One program per chunk and row: its largest logit; NaN if it holds one. With `group_largest`
    also the largest of each group of tokens, -inf past the vocabulary; any number beside a NaN."""
    row, chunk = tl.program_id(1).to(tl.int64), tl.program_id(0)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + row * stride + ids, ids < V, other=-float("inf")).to(tl.float32)
    has_nan = tl.max((x != x).to(tl.int32)) > 0
    tl.store(largest + row * CHUNKS + chunk, tl.where(has_nan, float("nan"), tl.max(x)))
    if group_largest is not None:
        each = (row * CHUNKS + chunk) * (CHUNK // GROUP) + tl.arange(0, CHUNK // GROUP)
        tl.store(group_largest + each, tl.max(tl.reshape(x, (CHUNK // GROUP, GROUP)), 1))


@triton.jit
def weigh_kernel(
    logits, data, largest, masses, norms, levels, stride, V: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr, CHUNK: tl.constexpr, TRUNCATES: tl.constexpr,
):  # fmt: skip
    """One program per chunk and row: the weight of what min_p keeps, and the sum of
    exp(x - largest) of all, without temperature. Where top_p alone cuts a row, also the weight of
    all at each level or above."""
    row, chunk = tl.program_id(1).to(tl.int64), tl.program_id(0)
    row_data = data + row * COLUMNS
    divisor, greedy = temperature(row_data)  # pyright: ignore[reportGeneralTypeIssues]
    _, most, _ = row_largest(largest, row, CHUNKS, BLOCK_CHUNKS)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + row * stride + ids, ids < V, other=-float("inf")).to(tl.float32)
    _, d = tempered(x, divisor, most)  # pyright: ignore[reportGeneralTypeIssues]
    w = tl.where(ids < V, weights(d), 0)
    tl.store(norms + row * CHUNKS + chunk, tl.sum(tl.exp(x - most)))
    if TRUNCATES:
        top_k, top_p = truncation(row_data, V)  # pyright: ignore[reportGeneralTypeIssues]
        if (greedy == 0) & (top_k == 0) & (top_p < 1.0):
            here = tl.load(largest + row * CHUNKS + chunk)
            _here, nearest = tempered(here, divisor, most)  # pyright: ignore[reportGeneralTypeIssues]
            for i in range(LEVELS):
                mass = tl.full((), 0, tl.int64)
                if nearest >= level(i):
                    mass = tl.sum(tl.where(d >= level(i), w, 0))
                tl.store(levels + (row * CHUNKS + chunk) * LEVELS + i, mass)
        w = tl.where(w >= tl.load(row_data + MIN_WEIGHT), w, 0)
    tl.store(masses + row * CHUNKS + chunk, tl.sum(w))


@triton.jit
def pick_kernel(
    logits, data, points, largest, cuts, masses, norms, out, stride, V: tl.constexpr,
    CHUNKS: tl.constexpr, BLOCK_CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
    TRUNCATES: tl.constexpr,
):  # fmt: skip
    """One program per row: its token and the bits of its log-probabilities, int32 [S, 3]."""
    row = tl.program_id(0).to(tl.int64)
    row_data = data + row * COLUMNS
    divisor, greedy = temperature(row_data)  # pyright: ignore[reportGeneralTypeIssues]
    each, most, bad = row_largest(largest, row, CHUNKS, BLOCK_CHUNKS)
    chunks = tl.arange(0, BLOCK_CHUNKS)
    mass = tl.load(masses + row * CHUNKS + chunks, chunks < CHUNKS, other=0)
    total = tl.sum(mass)
    point = (total.to(tl.float64) * random_number(points, row, row_data)).to(tl.int64)
    drawn = tl.sum((tl.cumsum(mass, 0) <= point).to(tl.int32))
    likeliest = tl.min(tl.where(each == most, chunks, CHUNKS))
    chunk = tl.minimum(tl.where(greedy, likeliest, drawn), CHUNKS - 1)
    point -= tl.sum(tl.where(chunks < chunk, mass, 0))
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + row * stride + ids, ids < V, other=-float("inf")).to(tl.float32)
    _, d = tempered(x, divisor, most)  # pyright: ignore[reportGeneralTypeIssues]
    w = tl.where(ids < V, weights(d), 0)
    if TRUNCATES:
        least_weight = tl.load(row_data + MIN_WEIGHT)
        w = tl.where(w >= least_weight, w, 0)
    drawn = chunk * CHUNK + tl.sum((tl.cumsum(w, 0) <= point).to(tl.int32))
    if TRUNCATES:
        by_cut = tl.load(cuts + row * 4 + 2).to(tl.int32)
        drawn = tl.where(by_cut >= 0, by_cut, drawn)
        total = tl.where(by_cut >= 0, tl.load(cuts + row * 4 + 3), total)
    likeliest = tl.min(tl.where((x == most) & (ids < V), ids, V))
    forced = tl.load(row_data + FORCED).to(tl.int32)
    token = tl.where(forced >= 0, forced, tl.where(greedy, likeliest, drawn))
    token = tl.where(bad & (forced < 0), 0, tl.minimum(token, V - 1))

    chosen = tl.load(logits + row * stride + token).to(tl.float32)
    norm = tl.sum(tl.load(norms + row * CHUNKS + chunks, chunks < CHUNKS, other=0.0))
    logprob = tl.where(bad, float("nan"), chosen - most - tl.log(norm))
    t, d = tempered(chosen, divisor, most)  # pyright: ignore[reportGeneralTypeIssues]
    sampled = d - tl.log(total.to(tl.float32) / WHOLE)
    if TRUNCATES:
        kept = is_kept(order(t), token, tl.load(cuts + row * 4), tl.load(cuts + row * 4 + 1))
        kept = kept & (weights(d) >= least_weight)
        sampled = tl.where(kept, sampled, -float("inf"))
    else:
        sampled = tl.where(divisor == 1.0, logprob, sampled)
    sampled = tl.where(greedy, 0.0, sampled)
    tl.store(out + row * 3, token)
    tl.store(out + row * 3 + 1, logprob.to(tl.int32, bitcast=True))
    tl.store(out + row * 3 + 2, sampled.to(tl.int32, bitcast=True))
