"""What a run on a GPU chooses by its memory plan when it starts."""

from __future__ import annotations

from typing import NamedTuple

from threadweaver.train.memory.phases import Updating, phases_of
from threadweaver.train.memory.planner import LEAST_TOKENS, Planner
from threadweaver.train.memory.target import target_of
from threadweaver.train.stages import RLConfig, SFTConfig


class PassChoice(NamedTuple):
    """Most tokens of a pass, None if a whole batch fits, and a line to show, if there is any."""

    tokens: int | None
    note: str | None


def choose_pass_tokens(config: SFTConfig | RLConfig) -> PassChoice:
    """The largest passes with which an update fits the device."""
    planner, target = Planner(config), target_of(config.compute)
    (phase,) = (phase for phase in phases_of(config) if isinstance(phase, Updating))
    tokens = planner.fitting_tokens(phase, config.compute, target)
    most, memory = config.optimization.batch_tokens, f"{target.memory / 1e9:,.0f} GB"
    if tokens == most:
        return PassChoice(None, None)
    if tokens is None:
        return PassChoice(
            LEAST_TOKENS,
            f"compute.pass_tokens: {LEAST_TOKENS:,}, the fewest, though by --plan an update does "
            f"not fit {memory} with them either",
        )
    return PassChoice(
        tokens, f"compute.pass_tokens: {tokens:,}, since by --plan {most:,} do not fit {memory}"
    )
