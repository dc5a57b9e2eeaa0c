"""What the tests of sample_tokens share: rows of logits and settings, and the definition to hold
backends to."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tw_kernels.sampling import Draws, SamplingRows, sample_tokens
from tw_kernels.sampling.rows import Settings

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_logits(seed: int, rows: int, vocabulary: int, kind: str = "normal") -> Tensor:
    x = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3
    if kind == "ties":
        x = x.round()
    elif kind == "signed zeros":
        x = x.sign() * 0.0
    elif kind == "excluded":
        x[:, ::2] = -math.inf
    elif kind == "steep":
        x *= 40
    return x


def rows_of(settings: list[Settings], forced: list[int | None] | None = None) -> SamplingRows:
    count = len(settings)
    return SamplingRows.build([2**63 + 7 * i for i in range(count)], range(count), settings, forced)


def run(backend: str, logits: Tensor, rows: SamplingRows, points: Tensor | None = None) -> Draws:
    device = DEVICE if backend == "triton" else "cpu"
    moved = SamplingRows(rows.data.to(device), rows.truncates)
    points = None if points is None else points.to(device)
    return Draws.unpack(sample_tokens(logits.to(device), moved, points, backend).cpu())


def assert_draws_as_defined(
    backend: str, logits: Tensor, rows: SamplingRows, points: Tensor | None = None
) -> None:
    want, got = run("reference", logits, rows, points), run(backend, logits, rows, points)
    meant = ~want.logprobs.isnan()
    assert torch.equal(~got.logprobs.isnan(), meant)
    assert torch.equal(got.tokens[meant], want.tokens[meant])
    # Log-probabilities are differences of float32 numbers as large as logits, tempered or not.
    largest = float(logits.float().nan_to_num(0, 0, 0).abs().max()) if logits.numel() else 0.0
    atol = max(2e-5, 2**-21 * largest)
    for a, b in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(a[meant], b[meant], atol=atol, rtol=1e-6)
