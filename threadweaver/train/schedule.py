"""Learning rate of a step: linear warm-up, then a cosine to zero (SFT) or no change (P-GRPO)."""

import math


def constant_rate(step: int, total_steps: int, peak: float, warmup: float) -> float:
    """The rate of step `step`, counted from 0.

    It climbs over the first ceil(warmup * total_steps) steps to `peak`, which the last of them and
    all after have.
    """
    warmup_steps = math.ceil(warmup * total_steps)
    return peak * (step + 1) / warmup_steps if step < warmup_steps else peak


def cosine_rate(step: int, total_steps: int, peak: float, warmup: float) -> float:
    """As `constant_rate`, but from the step after the warm-up, which has `peak` too, it falls, and
    would reach zero at step total_steps, the first that is not taken."""
    warmup_steps = math.ceil(warmup * total_steps)
    if step < warmup_steps:
        return constant_rate(step, total_steps, peak, warmup)
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))
