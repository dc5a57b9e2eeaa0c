"""The Triton kernel of sample_tokens that draws from the rows which top_k or top_p cut: `cut`.

A program a row, which reads few of its logits. What `largest` and `weigh` have written gives it a
bound that all kept tokens reach:

    top_k          the largest logits of k groups of tokens reach it
    top_p alone    the tokens of this level or above weigh what is to be kept

The groups that reach it are listed by id, and then those of their tokens that do: the candidates.
Bisection over the order of float32 finds the last kept one, by number for top_k and by weight for
top_p, and one more pass the drawn one. Where the candidates are too many to be listed (a flat
distribution, or equal logits), these passes go over all tokens of the groups.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tw_kernels.sampling.triton_arithmetic import (
    COLUMNS,
    LEVELS,
    MIN_WEIGHT,
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

LEAST_KEY = tl.constexpr(-2139095040)  # of all but -inf, which has weight 0
BELOW_ALL, ABOVE_ALL = tl.constexpr(-(2**31)), tl.constexpr(2**31 - 1)


@triton.jit
def _bound_by_count(keys, most, k):
    """A key that k of the keys reach, and hardly more than 2 k; LEAST_KEY where fewer than k do."""
    low = tl.full((), LEAST_KEY, tl.int64)
    high = most.to(tl.int64) + 1
    reached = tl.sum((keys >= LEAST_KEY).to(tl.int32))
    while (reached > 2 * k) & (high - low > 1):
        middle = (low + high) >> 1
        count = tl.sum((keys >= middle.to(tl.int32)).to(tl.int32))
        low = tl.where(count >= k, middle, low)
        high = tl.where(count >= k, high, middle)
        reached = tl.where(count >= k, count, reached)
    return low.to(tl.int32)


@triton.jit
def _bound_by_weight(levels, row, top_p, CHUNKS: tl.constexpr, BLOCK_CHUNKS: tl.constexpr):
    """The highest level whose tokens weigh what top_p keeps, and the weight of all."""
    chunks = tl.arange(0, BLOCK_CHUNKS)[:, None]
    each = tl.arange(0, LEVELS)[None, :]
    at = levels + (row * CHUNKS + chunks) * LEVELS + each
    sums = tl.sum(tl.load(at, (chunks < CHUNKS) & (each >= 0), other=0), 0)
    mass = tl.max(sums)
    first = tl.sum((sums < _share(mass, top_p)).to(tl.int32))
    return level(first), mass


@triton.jit
def _share(mass, top_p):
    """What top_p < 1 keeps of a weight: never more, as the next number below 1 takes half a unit
    in the last place off a product in float64."""
    return tl.maximum(tl.ceil(mass.to(tl.float64) * top_p).to(tl.int64), 1)


@triton.jit
def _entries(source, at, size, V: tl.constexpr, GROUP: tl.constexpr, LISTED: tl.constexpr):
    """Tempered logits, their keys and ids at some places of a list of so many: of the candidates,
    or of the tokens of their groups. -inf past its end, and past the vocabulary's."""
    x_row, groups, values, ids, divisor, most = source
    there = at < size
    if LISTED:
        t = tl.load(values + at, there, other=-float("inf"))
        tokens = tl.load(ids + at, there, other=0)
    else:
        tokens = tl.load(groups + at // GROUP, there, other=0) * GROUP + at % GROUP
        x = tl.load(x_row + tokens, there & (tokens < V), other=-float("inf")).to(tl.float32)
        t, _ = tempered(x, divisor, most)  # pyright: ignore[reportGeneralTypeIssues]
    return t, order(t), tokens


@triton.jit
def _amounts(
    t, key, tokens, top, low, high, last_key, last_id, least_weight, COUNT: tl.constexpr
):  # fmt: skip
    """1, or the weight, of each token of a key from low to high, not after the last kept one."""
    counts = (key >= low) & (key <= high) & is_kept(key, tokens, last_key, last_id)
    if COUNT:
        amounts = counts.to(tl.int64)
    else:
        w = weights(t - top)
        amounts = tl.where(counts & (w >= least_weight), w, 0)
    return amounts


@triton.jit
def _amount(
    source, size, top, low, last_key, last_id, least_weight, V: tl.constexpr, GROUP: tl.constexpr,
    LISTED: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """The amounts of all tokens of at least a key together; the nearest keys that there are: the
    least from it on, and the largest below it."""
    total = tl.zeros((BLOCK,), tl.int64)
    above = tl.full((BLOCK,), ABOVE_ALL, tl.int32)
    below = tl.full((BLOCK,), BELOW_ALL, tl.int32)
    for start in range(0, size, BLOCK):
        t, key, tokens = _entries(source, start + tl.arange(0, BLOCK), size, V, GROUP, LISTED)
        total += _amounts(
            t, key, tokens, top, low, ABOVE_ALL, last_key, last_id, least_weight, COUNT
        )
        above = tl.minimum(above, tl.where(key >= low, key, ABOVE_ALL))
        below = tl.maximum(below, tl.where(key < low, key, BELOW_ALL))
    return tl.sum(total), tl.min(above), tl.max(below)


@triton.jit
def _reach(
    source, size, top, target, low, high, last_key, last_id, least_weight, V: tl.constexpr,
    GROUP: tl.constexpr, LISTED: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """The id at which the amounts, added up in the order of ids, reach the target; V if nowhere."""
    before = tl.full((), 0, tl.int64)
    found = tl.full((), V, tl.int64)
    for start in range(0, size, BLOCK):
        t, key, tokens = _entries(source, start + tl.arange(0, BLOCK), size, V, GROUP, LISTED)  # pyright: ignore[reportGeneralTypeIssues]
        amounts = _amounts(t, key, tokens, top, low, high, last_key, last_id, least_weight, COUNT)
        reached = (amounts > 0) & (before + tl.cumsum(amounts, 0) >= target)
        found = tl.minimum(found, tl.min(tl.where(reached, tokens, V)))
        before += tl.sum(amounts)
    return found


@triton.jit
def _last(
    source, size, top, target, least, last_key, last_id, V: tl.constexpr, GROUP: tl.constexpr,
    LISTED: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """The last token, as key and id, of the fewest first ones whose amounts reach the target; of
    all down to the least key, with the id V, if they do not: the others are -inf.

    Invariant: tokens of keys >= low reach it, those of keys > high do not. Both are keys that there
    are, so that there are no more passes than it takes to tell these apart, few in 16-bit logits.
    """
    low, high = least, order(top)
    before = tl.full((), 0, tl.int64)  # the amount of keys > high
    while low < high:
        middle = ((low.to(tl.int64) + high.to(tl.int64) + 1) >> 1).to(tl.int32)
        amount, above, below = _amount(
            source, size, top, middle, last_key, last_id, 0, V, GROUP, LISTED, BLOCK, COUNT
        )
        low = tl.where(amount >= target, above, low)
        high = tl.where(amount >= target, high, below)
        before = tl.where(amount >= target, before, amount)
    # Of the tokens of this key, all of one weight, as many as it takes, by id.
    last = _reach(
        source, size, top, target - before, low, low, last_key, last_id, 0, V, GROUP, LISTED, BLOCK,
        COUNT,
    )  # fmt: skip
    return low, last


@triton.jit
def _draw(
    source, size, top, least, top_k, top_p, mass, least_weight, u, V: tl.constexpr,
    GROUP: tl.constexpr, LISTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The last kept token, as key and id, the drawn one, and what the kept ones weigh."""
    key = tl.full((), BELOW_ALL, tl.int32)
    last = tl.full((), V, tl.int64)
    if top_k > 0:
        key, last = _last(  # pyright: ignore[reportGeneralTypeIssues]
            source, size, top, top_k, least, key, last, V, GROUP, LISTED, BLOCK, True
        )
        mass, _above, _below = _amount(
            source, size, top, key, key, last, 0, V, GROUP, LISTED, BLOCK, False
        )
        least = key
    if top_p < 1.0:
        target = _share(mass, top_p)
        key, last = _last(
            source, size, top, target, least, key, last, V, GROUP, LISTED, BLOCK, False
        )
    total, _above, _below = _amount(  # pyright: ignore[reportGeneralTypeIssues]
        source, size, top, LEAST_KEY, key, last, least_weight, V, GROUP, LISTED, BLOCK, False
    )
    point = (total.to(tl.float64) * u).to(tl.int64)
    token = _reach(
        source, size, top, point + 1, LEAST_KEY, ABOVE_ALL, key, last, least_weight, V, GROUP,
        LISTED, BLOCK, False,
    )  # fmt: skip
    return key, last, token, total


@triton.jit
def _list_candidates(
    source, size, top, least_key, least_d, V: tl.constexpr, GROUP: tl.constexpr,
    CANDIDATES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the tokens of the listed groups that reach a bound, by id, as far as there is room;
    returns how many there are, and the least of their keys."""
    _, _, values, ids, _, _ = source
    candidates = tl.full((), 0, tl.int32)
    least = tl.full((), ABOVE_ALL, tl.int32)
    for start in range(0, size, BLOCK):
        t, key, tokens = _entries(source, start + tl.arange(0, BLOCK), size, V, GROUP, False)  # pyright: ignore[reportGeneralTypeIssues]
        reaches = (key >= least_key) & (t - top >= least_d)
        at = candidates + tl.cumsum(reaches.to(tl.int32), 0) - 1
        tl.store(values + at, t, reaches & (at < CANDIDATES))
        tl.store(ids + at, tokens, reaches & (at < CANDIDATES))
        candidates += tl.sum(reaches.to(tl.int32))
        least = tl.minimum(least, tl.min(tl.where(reaches, key, ABOVE_ALL)))
    return candidates, least


@triton.jit
def cut_kernel(
    logits, data, points, largest, of_groups, levels, groups, values, ids, cuts, stride,
    V: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_CHUNKS: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr, GROUP: tl.constexpr, CANDIDATES: tl.constexpr, BLOCK: tl.constexpr,
    LIST_BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row: of the tokens that top_k and top_p keep the last, as key and id, the
    drawn one, and the weight of all, int64 [S, 4]. A row that neither cuts has the token -1.

    Workspaces: groups int32 [S, GROUPS], values float32 and ids int32 [S, CANDIDATES].
    """
    row = tl.program_id(0).to(tl.int64)
    row_data = data + row * COLUMNS
    divisor, greedy = temperature(row_data)  # pyright: ignore[reportGeneralTypeIssues]
    _of_chunks, most, bad = row_largest(largest, row, CHUNKS, BLOCK_CHUNKS)
    top_k, top_p = truncation(row_data, V)  # pyright: ignore[reportGeneralTypeIssues]
    key = tl.full((), BELOW_ALL, tl.int32)
    last = tl.full((), V, tl.int64)
    token = tl.full((), -1, tl.int64)
    total = tl.full((), 0, tl.int64)
    if (greedy == 0) & (bad == 0) & ((top_k > 0) | (top_p < 1.0)):
        u = random_number(points, row, row_data)
        least_weight = tl.load(row_data + MIN_WEIGHT)
        top, _of_top = tempered(most, divisor, most)  # pyright: ignore[reportGeneralTypeIssues]
        each = tl.arange(0, BLOCK_GROUPS)
        x = tl.load(of_groups + row * GROUPS + each, each < GROUPS, other=-float("inf"))
        t, d = tempered(x, divisor, most)  # pyright: ignore[reportGeneralTypeIssues]
        least_key = tl.full((), LEAST_KEY, tl.int32)
        least_d = tl.full((), -float("inf"), tl.float32)
        mass = tl.full((), 0, tl.int64)
        if top_k > 0:
            least_key = _bound_by_count(order(t), order(top), top_k)
        else:
            least_d, mass = _bound_by_weight(levels, row, top_p, CHUNKS, BLOCK_CHUNKS)
        reaches = (order(t) >= least_key) & (d >= least_d)
        groups += row * GROUPS
        tl.store(groups + tl.cumsum(reaches.to(tl.int32), 0) - 1, each, reaches)
        size = tl.sum(reaches.to(tl.int32)) * GROUP
        tl.debug_barrier()  # other threads of the program read what one has written
        values += row * CANDIDATES
        ids += row * CANDIDATES
        source = (logits + row * stride, groups, values, ids, divisor, most)
        candidates, least = _list_candidates(
            source, size, top, least_key, least_d, V, GROUP, CANDIDATES, BLOCK
        )
        tl.debug_barrier()
        if candidates <= CANDIDATES:
            key, last, token, total = _draw(
                source, candidates, top, least, top_k, top_p, mass, least_weight, u, V, GROUP,
                True, LIST_BLOCK,
            )  # fmt: skip
        else:
            key, last, token, total = _draw(
                source, size, top, least, top_k, top_p, mass, least_weight, u, V, GROUP, False,
                BLOCK,
            )  # fmt: skip
    tl.store(cuts + row * 4, key)
    tl.store(cuts + row * 4 + 1, last)
    tl.store(cuts + row * 4 + 2, token)
    tl.store(cuts + row * 4 + 3, total)
