"""sample_tokens on a CPU: tokens by csrc/cpu/sampling.h, log-probabilities by torch.

Rows of equal settings go together, a few at a time, so that intermediate results stay in a cache.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from tw_kernels import _C
from tw_kernels.sampling.rows import COLD, Column, SamplingRows, Settings, uniforms

_LOGITS = 2**19  # at a time


def why_not(logits: Tensor) -> str | None:
    """None if this call can run, else the reason in one line."""
    return None if logits.device.type == "cpu" else f"it runs on a CPU, not on {logits.device.type}"


def forward(logits: Tensor, rows: SamplingRows, points: Tensor | None) -> Tensor:
    """Packed draws, int32 [S, 3]."""
    data = rows.data.numpy()
    if points is None:
        keys, positions = data[:, Column.KEY].view(np.uint64), data[:, Column.POSITION]
        points = torch.from_numpy(uniforms(keys, positions.astype(np.uint64)))
    rows_of: dict[Settings, list[int]] = {}
    for row, columns in enumerate(data[:, Column.TEMPERATURE :].tolist()):
        rows_of.setdefault(Settings(*columns), []).append(row)
    forced = rows.data[:, Column.FORCED]
    packed = torch.empty(len(data), 3, dtype=torch.int32)
    at_once = max(1, _LOGITS // logits.shape[-1])
    for settings, members in rows_of.items():
        for first in range(0, len(members), at_once):
            at = _index(members[first : first + at_once])
            draws = _sample_alike(logits[at].float(), settings, points[at], forced[at])
            packed[at, 0] = draws[0].int()
            packed[at, 1:] = torch.stack(draws[1:], 1).view(torch.int32)
    return packed


def _index(rows: list[int]) -> slice | Tensor:
    """The rows as a slice if they are contiguous, which copies nothing; else as a tensor."""
    if rows[-1] - rows[0] + 1 == len(rows):
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows)


def _sample_alike(
    logits: Tensor, settings: Settings, points: Tensor, forced: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens int64 [S] and their two log-probabilities float32 [S], of rows of equal settings."""
    norm = logits.logsumexp(-1)
    greedy = not settings.divisor
    tempered = logits if greedy or settings.divisor == 1 else _temper(logits, settings.divisor)
    if settings.truncates:
        tempered = _truncate(tempered, settings)
    tokens = tempered.argmax(-1) if greedy else _draw(tempered, points)
    tokens = torch.where(forced >= 0, forced, tokens)
    logprobs = logits.gather(-1, tokens[:, None])[:, 0] - norm
    logprobs = torch.where(norm.isfinite(), logprobs, logprobs.new_tensor(math.nan))
    if greedy:
        return tokens, logprobs, torch.zeros_like(logprobs)
    if tempered is logits:
        return tokens, logprobs, logprobs
    sampled = tempered.gather(-1, tokens[:, None])[:, 0] - tempered.logsumexp(-1)
    return tokens, logprobs, sampled


def _temper(logits: Tensor, divisor: float) -> Tensor:
    """The logits divided by a temperature above 0; only -inf stays, or becomes, -inf."""
    if divisor < np.float32(COLD):
        # The likeliest is 0 and the others below: none overflows to +inf.
        logits = logits - logits.amax(-1, keepdim=True)
    return logits / divisor


def _truncate(logits: Tensor, settings: Settings) -> Tensor:
    """A copy with -inf for the tokens that are cut off."""
    rows, vocabulary = logits.shape
    kept = logits.clone(memory_format=torch.contiguous_format)
    _C.truncate_logits(
        rows,
        vocabulary,
        torch.get_num_threads(),
        kept.data_ptr(),
        settings.top_k or vocabulary,
        settings.mass,
        settings.min_weight,
    )
    return kept


def _draw(logits: Tensor, points: Tensor) -> Tensor:
    """int64 [S]: where the points [S] fall in the cumulative distribution of each row."""
    logits, points = logits.contiguous(), points.contiguous()
    rows, vocabulary = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64)
    _C.draw_tokens(
        rows,
        vocabulary,
        torch.get_num_threads(),
        logits.data_ptr(),
        points.data_ptr(),
        tokens.data_ptr(),
    )
    return tokens
