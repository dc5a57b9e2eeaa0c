"""Temperatures just above 0, as people write them for 'greedy': each gives the likeliest token and
log-probabilities that are numbers; so do the far ends of the other settings."""

import sys
from typing import Any

import numpy as np
import torch

from threadweaver.generate.sampler import SamplingParams, sample

COLD = (1e-2, 1e-4, 1e-6, 1e-8, 1e-12, 1e-30, 1e-37, 1e-38, 1e-40, 1e-45, 5e-324)
TRUNCATIONS: tuple[dict[str, Any], ...] = ({}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1})
ENDS: tuple[dict[str, Any], ...] = (
    {"top_p": 1e-300},
    {"top_k": 10**9},
    {"top_k": 10**30},
    {"min_p": 1.0},
    {"top_p": 0.5, "top_k": 2, "min_p": 0.5},
    {"temperature": 1e308},
)


def fault() -> str | None:
    torch.manual_seed(0)
    for vocabulary in (100, 3000, 5000):
        for dtype in (torch.float32, torch.bfloat16):
            logits = (torch.randn(4, vocabulary) * 10).to(dtype)
            logits[:, -3:] = -torch.inf  # rows of a padded vocabulary
            best = logits.float().argmax(-1)
            unique = (logits == logits.amax(-1, keepdim=True)).sum(-1) == 1
            for temperature in COLD:
                for truncation in TRUNCATIONS:
                    params = SamplingParams(temperature=temperature, **truncation)
                    draws = sample(logits, [params] * 4, np.full(4, 0.37))
                    if ((draws.tokens != best) & unique).any():
                        return f"{params}: not the likeliest of {vocabulary} tokens"
                    if not (draws.logprobs.isfinite() & draws.sampled_logprobs.isfinite()).all():
                        return f"{params}: log-probabilities {draws}"
    flat = torch.zeros(1, 5000)
    flat[:, -3:] = -torch.inf
    for settings in ENDS:
        draws = sample(flat, [SamplingParams(**settings)], np.array([0.999]))
        if not draws.sampled_logprobs.isfinite().all() or draws.tokens.item() >= 4997:
            return f"{settings}: {draws}"
    return None


if __name__ == "__main__":
    sys.exit(fault())
