"""From logits to tokens: temperature, truncation, and draws that depend on their key alone.

The random number of a token is a hash of its key (seed, request, position), so a draw does not
depend on the rest of the batch, the schedule or the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

_WORD = 2**64
# Mixing constants of SplitMix64 (Steele, Lea, Flood 2014).
_STEP, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_BLOCK = 256  # tokens whose weights are summed together at first
_CANDIDATES = 1024  # likeliest tokens among which truncation is first tried
_CPU_LOGITS = 2**19  # at a time, so that intermediate results stay in a CPU's cache
_COLD = 1e-3  # below this temperature a logit divided by it may overflow
_HOT = 1 / torch.finfo(torch.float32).tiny  # beyond it all that are finite are alike


@dataclass(frozen=True)
class SamplingParams:
    """How a token is drawn. Truncations apply in this order, each to the result of the last.

    Args:
        temperature: divides the logits; 0 takes the likeliest token, and so does whatever is close
            to 0, down to the smallest float (equally likely ones are drawn from).
        top_k: only the k likeliest tokens; null: all.
        top_p: only the likeliest tokens, as many as it takes to hold this probability.
        min_p: only tokens at least this fraction as likely as the likeliest.

    Raises:
        ValueError: a setting out of range; names it.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature is {self.temperature}: it must be at least 0")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}: it must be at least 1")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: it must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}: it must be from 0 to 1")

    @property
    def truncates(self) -> bool:
        return self.top_k is not None or self.top_p < 1 or self.min_p > 0


class Draws(NamedTuple):
    """One token a row; on the logits' device.

    Attributes:
        tokens: int64 [S].
        logprobs: float32 [S], of the token under the untempered model. NaN where the row's logits
            hold a NaN or +inf, or nothing but -inf: the token then means nothing.
        sampled_logprobs: float32 [S], under the distribution it was drawn from; 0 if greedy.
    """

    tokens: Tensor
    logprobs: Tensor
    sampled_logprobs: Tensor


def stream_key(numbers: Iterable[int]) -> int:
    """A 64-bit hash of the numbers that name a stream of draws, such as a seed and request id."""
    state = 0
    for number in numbers:
        state = _mix((state ^ (number % _WORD)) + _STEP)
    return state


def _mix(z: int) -> int:
    z %= _WORD
    z = (z ^ (z >> 30)) * _MIX1 % _WORD
    z = (z ^ (z >> 27)) * _MIX2 % _WORD
    return z ^ (z >> 31)


def uniforms(keys: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.float64]:
    """One number in [0, 1 - 2^-52] for each (stream key, position), [S]: SplitMix64's output."""
    z = keys + (positions + np.uint64(1)) * np.uint64(_STEP)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX2)
    z ^= z >> np.uint64(31)
    return (z >> np.uint64(12)).astype(np.float64) * 2.0**-52


def sample(
    logits: Tensor,
    params: Sequence[SamplingParams],
    u: NDArray[np.float64],
    forced: Sequence[int | None] | None = None,
) -> Draws:
    """Draws a token for each row.

    Args:
        logits: [S, V].
        params: of each row.
        u: a uniform number in [0, 1) for each row, the point in its cumulative distribution.
        forced: tokens to take instead of the drawn ones, None where there is none; the
            log-probabilities are theirs (-inf for one that truncation excludes).
    """
    rows_of: dict[SamplingParams, list[int]] = {}
    for row, p in enumerate(params):
        rows_of.setdefault(p, []).append(row)
    fixed = None
    if forced is not None and any(token is not None for token in forced):
        fixed = torch.tensor([-1 if t is None else t for t in forced], device=logits.device)
    points = torch.from_numpy(u).to(logits.device)
    tokens = torch.empty(len(params), dtype=torch.int64, device=logits.device)
    logprobs, sampled = (torch.empty(len(params), device=logits.device) for _ in range(2))
    at_once = len(params)
    if logits.device.type == "cpu":
        at_once = max(1, _CPU_LOGITS // logits.shape[-1])
    for p, rows in rows_of.items():
        for first in range(0, len(rows), at_once):
            at = _index(rows[first : first + at_once], logits.device)
            part_fixed = None if fixed is None else fixed[at]
            part = _sample_alike(logits[at].float(), p, points[at], part_fixed)
            tokens[at], logprobs[at], sampled[at] = part
    return Draws(tokens, logprobs, sampled)


def _index(rows: list[int], device: torch.device) -> slice | Tensor:
    """The rows as a slice if they are contiguous, which copies nothing; else as a tensor."""
    if rows[-1] - rows[0] + 1 == len(rows):
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, device=device)


def _sample_alike(
    logits: Tensor, params: SamplingParams, u: Tensor, forced: Tensor | None
) -> Draws:
    norm = logits.logsumexp(-1)
    greedy = params.temperature == 0
    tempered = logits if greedy or params.temperature == 1 else _temper(logits, params.temperature)
    if params.truncates:
        tempered = _truncate(tempered, params)
    tokens = tempered.argmax(-1) if greedy else _draw(tempered, u)
    if forced is not None:
        tokens = torch.where(forced >= 0, forced, tokens)
    logprobs = logits.gather(-1, tokens[:, None])[:, 0] - norm
    logprobs = torch.where(norm.isfinite(), logprobs, logprobs.new_tensor(math.nan))
    if greedy:
        return Draws(tokens, logprobs, torch.zeros_like(logprobs))
    if tempered is logits:
        return Draws(tokens, logprobs, logprobs)
    sampled = tempered.gather(-1, tokens[:, None])[:, 0] - tempered.logsumexp(-1)
    return Draws(tokens, logprobs, sampled)


def _temper(logits: Tensor, temperature: float) -> Tensor:
    """The logits divided by a temperature above 0; only -inf stays, or becomes, -inf."""
    # The temperature and its inverse, by which a GPU multiplies, are normal float32 numbers.
    divisor = min(max(temperature, 1 / _HOT), _HOT)
    if temperature < _COLD:
        # The likeliest is 0 and the others below: none overflows to +inf.
        logits = logits - logits.amax(-1, keepdim=True)
    return logits / divisor


def _draw(logits: Tensor, u: Tensor) -> Tensor:
    """int64 [S]: where u falls in the cumulative distribution of each row.

    A large vocabulary is summed by blocks; only the block that holds the point is looked into.
    """
    vocabulary = logits.shape[-1]
    weights = (logits - logits.amax(-1, keepdim=True)).exp_()
    if vocabulary <= _BLOCK:
        cumulative = weights.cumsum(-1, dtype=torch.float64)
        # The point is below the last of a row that is finite, so that there is a first token whose
        # cumulative weight exceeds it; that token has a weight above 0.
        tokens = torch.searchsorted(cumulative, u[:, None] * cumulative[:, -1:], right=True)
        return tokens[:, 0].clamp_(max=vocabulary - 1)
    blocks = F.pad(weights, (0, -vocabulary % _BLOCK)).unflatten(-1, (-1, _BLOCK))
    sums = blocks.sum(-1)
    ends = sums.cumsum(-1, dtype=torch.float64)
    points = u[:, None] * ends[:, -1:]
    block = torch.searchsorted(ends, points, right=True).clamp_(max=blocks.shape[1] - 1)
    before = ends.gather(1, block) - sums.gather(1, block)
    cumulative = blocks.gather(1, block[..., None].expand(-1, -1, _BLOCK))[:, 0]
    cumulative = cumulative.cumsum(-1, dtype=torch.float64)
    # The block's sum is rounded differently from the cumulative sum of its weights: a point close
    # to an end may lie outside, and is moved inside.
    points = torch.minimum((points - before).clamp_(min=0), cumulative[:, -1:] * (1 - 2.0**-52))
    tokens = block * _BLOCK + torch.searchsorted(cumulative, points, right=True)
    return tokens[:, 0].clamp_(max=vocabulary - 1)


def _truncate(logits: Tensor, params: SamplingParams) -> Tensor:
    """-inf for the tokens that are cut off; of equal ones the lower id is kept."""
    vocabulary = logits.shape[-1]
    candidates = max(_CANDIDATES, 2 * (params.top_k or 0))
    if 4 * candidates > vocabulary:
        return _keep(logits, *logits.sort(dim=-1, descending=True, stable=True), params)[0]
    # Sorting everything costs more than a small model's pass, and the kept tokens are almost always
    # among the likeliest few. They are unless a kept one equals the last of these.
    ids = logits.topk(candidates, sorted=False).indices.sort().values
    ordered, order = logits.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    truncated, keep = _keep(logits, ordered, ids.gather(-1, order), params)
    beyond = (keep & (ordered == ordered[:, -1:])).any(-1).nonzero()[:, 0]
    if len(beyond):
        rest = logits[beyond]
        sorted_rest = rest.sort(dim=-1, descending=True, stable=True)
        truncated[beyond] = _keep(rest, *sorted_rest, params)[0]
    return truncated


def _keep(
    logits: Tensor, ordered: Tensor, ids: Tensor, params: SamplingParams
) -> tuple[Tensor, Tensor]:
    """The truncated logits, and which of the likeliest tokens, `ids` in this order, are kept."""
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if params.top_k is not None:
        keep[:, params.top_k :] = False
    left = logits if params.top_k is None else ordered[:, : params.top_k]
    probabilities = (ordered - left.logsumexp(-1, keepdim=True)).exp()
    if params.top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        keep &= before < params.top_p
    if params.min_p > 0:
        keep &= probabilities >= params.min_p * probabilities[:, :1]
    keep[:, 0] = True
    truncated = torch.full_like(logits, -math.inf)
    return truncated.scatter_(-1, ids, ordered.masked_fill(~keep, -math.inf)), keep
