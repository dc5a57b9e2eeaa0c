"""sample_tokens: a token for each row of logits, the same one on every device.

A draw is defined in whole numbers, whose sums do not depend on their order, so that backends cut
the vocabulary as it suits them and still choose the same token, bit for bit:

1.  Logits, as float32, are divided by the temperature (below COLD after the largest is subtracted).
2.  A tempered logit t below the row's largest m weighs round(2^40 exp(t - m)): exp is Cephes' expf
    in float32, each product and sum rounded (`reference.weights`).
3.  Tokens are ordered by t, equal ones by id. Kept are the first top_k; of those, the fewest first
    ones whose weights add up to at least top_p of theirs (the product and its ceiling in float64);
    of those, the ones that weigh at least ceil(2^40 min_p).
4.  In the order of ids, the token is the first at which the sum of the kept weights exceeds
    floor(u * their total), a product in float64. u is SplitMix64's output at the row's key and
    position (`rows.uniforms`). Temperature 0 takes the first of the order.

A backend is a module of two functions:

    why_not(logits)                        None if it can run this call, else the reason
    forward(logits, rows, points)          -> packed int32 [S, 3]; points: float64 [S] or None

native on a CPU, triton on CUDA; reference is the definition in NumPy, and only taken by name.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from tw_kernels.sampling import native, reference, triton
from tw_kernels.sampling.rows import MOST_TOKENS, Column, SamplingRows

SAMPLE_TOKENS: dict[str, ModuleType] = {
    "triton": triton,
    "native": native,
    "reference": reference,
}


class Draws(NamedTuple):
    """One token a row.

    Attributes:
        tokens: int64 [S].
        logprobs: float32 [S], of the token under the untempered model. NaN where the row's logits
            hold a NaN or +inf, or nothing but -inf: the token then means nothing.
        sampled_logprobs: float32 [S], under the distribution it was drawn from (-inf for a forced
            one that truncation excludes); 0 if greedy.
    """

    tokens: Tensor
    logprobs: Tensor
    sampled_logprobs: Tensor

    @classmethod
    def unpack(cls, packed: Tensor) -> Draws:
        """Of what `sample_tokens` returns."""
        logprobs = packed[:, 1:].contiguous().view(torch.float32)
        return cls(packed[:, 0].long(), logprobs[:, 0], logprobs[:, 1])


def sample_tokens(
    logits: Tensor,
    rows: SamplingRows,
    points: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Draws a token for each row of logits, and packs what came of it for one copy to the host.

    On CUDA nothing waits for the device, and what is launched follows from shapes and
    `rows.truncates` alone, so a call can be captured in a CUDA graph.

    Args:
        logits: [S, V], floating point, V < 2^22.
        rows: of each row, on the logits' device.
        points: float64 [S] in [0, 1), random numbers to take instead of those by key.
        backend: a name of SAMPLE_TOKENS; default: triton on CUDA, else native.

    Returns:
        int32 [S, 3]: the token, and the bits of its two log-probabilities (`Draws.unpack`).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, or a backend that cannot
            run here.
    """
    if logits.dim() != 2 or not 0 < logits.shape[1] < MOST_TOKENS:
        raise ValueError(f"logits must be [S, V], 0 < V < 2^22; got {tuple(logits.shape)}")
    if rows.data.shape != (logits.shape[0], len(Column)) or rows.data.dtype != torch.int64:
        raise ValueError(
            f"rows must be int64 [{logits.shape[0]}, {len(Column)}], "
            f"got {rows.data.dtype} {list(rows.data.shape)}"
        )
    if points is not None and (points.shape != logits.shape[:1] or points.dtype != torch.float64):
        raise ValueError(
            f"points must be float64 [{logits.shape[0]}], got {points.dtype} {list(points.shape)}"
        )
    devices = {x.device for x in (logits, rows.data, points) if x is not None}
    if len(devices) > 1:
        raise ValueError(f"logits, rows and points must share a device; got {devices}")
    name = backend or ("triton" if logits.is_cuda else "native")
    if name not in SAMPLE_TOKENS:
        raise ValueError(f"no backend {name!r} for sample_tokens: {', '.join(SAMPLE_TOKENS)}")
    if reason := SAMPLE_TOKENS[name].why_not(logits):
        raise ValueError(f"sample_tokens cannot run this call: {name}: {reason}")
    return SAMPLE_TOKENS[name].forward(logits, rows, points)
