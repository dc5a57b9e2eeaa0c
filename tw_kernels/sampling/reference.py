"""sample_tokens in NumPy, as op.py defines it: what the other backends are held to."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tw_kernels.sampling.rows import COLD, Column, SamplingRows, Settings, uniforms

_LOG2E = np.float32(math.log2(math.e))
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_MAGIC = np.float32(1.5 * 2**23)  # added to x, it leaves x as a whole number
_LEAST = np.float32(-29)  # its weight is 0
_POLYNOMIAL = tuple(
    np.float32(c)
    for c in (
        1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1,
        5.0000001201e-1,
    )
)  # fmt: skip


def why_not(logits: Tensor) -> str | None:
    """None if this call can run, else the reason in one line."""
    return None if logits.device.type == "cpu" else f"it runs on a CPU, not on {logits.device.type}"


def weights(d: NDArray[np.float32]) -> NDArray[np.int64]:
    """round(2^40 exp(d)) for d <= 0; 0 for a NaN."""
    x = np.where(d > _LEAST, d, _LEAST)
    n = (x * _LOG2E + _MAGIC) - _MAGIC
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    y = r * _POLYNOMIAL[0] + _POLYNOMIAL[1]
    for coefficient in _POLYNOMIAL[2:]:
        y = y * r + coefficient
    y = y * (r * r) + r + np.float32(1)
    shift = -n.astype(np.int64)
    fraction = (y * np.float32(2**24)).astype(np.int64) << 16
    return (fraction + ((np.int64(1) << shift) >> 1)) >> shift


def forward(logits: Tensor, rows: SamplingRows, points: Tensor | None) -> Tensor:
    """Packed draws, int32 [S, 3]."""
    data = rows.data.numpy()
    keys, positions = data[:, Column.KEY].view(np.uint64), data[:, Column.POSITION]
    u = uniforms(keys, positions.astype(np.uint64)) if points is None else points.numpy()
    with np.errstate(invalid="ignore"):
        packed = [
            _row(x, settings, int(forced), point)
            for x, settings, forced, point in zip(
                logits.float().numpy(),
                (Settings(*map(int, row[Column.TEMPERATURE :])) for row in data),
                data[:, Column.FORCED],
                u,
                strict=True,
            )
        ]
    tokens = np.array([token for token, _, _ in packed], np.int32).reshape(-1, 1)
    logprobs = np.array([pair for _, *pair in packed], np.float32).reshape(-1, 2)
    return torch.from_numpy(np.concatenate([tokens, logprobs.view(np.int32)], 1))


def _row(
    x: NDArray[np.float32], settings: Settings, forced: int, u: float
) -> tuple[int, float, float]:
    """A token and its log-probabilities, the latter in float64."""
    largest = np.max(x)
    if not np.isfinite(largest):
        return max(forced, 0), math.nan, math.nan
    likelihoods = x.astype(np.float64) - np.logaddexp.reduce(x.astype(np.float64))
    if not settings.divisor:
        token = int(x.argmax()) if forced < 0 else forced
        return token, likelihoods[token], 0.0
    divisor = np.float32(settings.divisor)
    tempered = (x - largest if divisor < np.float32(COLD) else x) / divisor
    weight = weights((tempered - np.max(tempered)).astype(np.float32))
    order = np.lexsort((np.arange(len(x)), -tempered))
    kept = order[: settings.top_k or None]
    if settings.mass < 1:
        mass = np.float64(weight[kept].sum())
        sums = weight[kept].cumsum()
        target = max(1, math.ceil(mass * settings.mass))
        kept = kept[: int(np.searchsorted(sums, target)) + 1]
    kept = np.sort(kept[weight[kept] >= settings.min_weight])
    sums = weight[kept].cumsum()
    token = int(kept[np.searchsorted(sums, int(float(sums[-1]) * u), side="right")])
    token = token if forced < 0 else forced
    norm = np.logaddexp.reduce(tempered[kept].astype(np.float64))
    sampled = float(tempered[token]) - norm if token in kept else -math.inf
    return token, likelihoods[token], sampled
