"""Learning rate of a step: linear warm-up, then a cosine to zero."""

import math


def learning_rate(step: int, total_steps: int, peak: float, warmup: float) -> float:
    """The rate of step `step`, counted from 0.

    It climbs over the first ceil(warmup * total_steps) steps to `peak`, which the last of them and
    the one after have, and would reach zero at step total_steps, the first that is not taken.
    """
    warmup_steps = math.ceil(warmup * total_steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))
