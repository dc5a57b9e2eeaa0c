"""Which phases a run has: updates of the weights, and rollouts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from threadweaver.train.config import AdamWConfig, OptimizationConfig, RunConfig
from threadweaver.train.policy_loss import PolicyConfig
from threadweaver.train.stages import (
    EvaluationConfig,
    PipelineConfig,
    RLConfig,
    RLRollouts,
    RLSettings,
    SelfTrainConfig,
    SelfTrainRollouts,
    SFTConfig,
)


@dataclass(frozen=True)
class Updating:
    """Passes over tries, and a step of the optimizer.

    Attributes:
        micro_batches: of a step, on all ranks; None: as many as there happen to be.
        policy: of P-GRPO; None: supervised.
    """

    title: str
    optimization: AdamWConfig
    micro_batches: int | None
    policy: PolicyConfig | None = None


@dataclass(frozen=True)
class RollingOut:
    """An engine that decodes.

    Attributes:
        section: of the settings, by dotted name, and what it says.
        weights: trained: those that are trained, as they are; loaded: others, in the dtype of
            products.
        keeps_trained: whether those that were trained are still there: one process on a GPU moves
            them to the host.
        beside: what is trained meanwhile, whose optimizer has its state.
        policy: of P-GRPO.
    """

    title: str
    section: str
    settings: EvaluationConfig | SelfTrainRollouts | RLRollouts
    weights: Literal["trained", "loaded"] = "trained"
    keeps_trained: bool = False
    beside: AdamWConfig | None = None
    policy: PolicyConfig | None = None


def phases_of(config: RunConfig) -> Iterator[Updating | RollingOut]:
    """In order."""
    if isinstance(config, SFTConfig):
        yield _supervised("SFT", config.optimization)
        if config.evaluate.data is not None:
            yield RollingOut("evaluation", "evaluate", config.evaluate, "loaded", True)
    elif isinstance(config, SelfTrainConfig):
        yield RollingOut("rollouts", "rollouts", config.rollouts)
        yield _supervised("SFT", config.optimization)
    elif isinstance(config, RLConfig):
        yield from _policy("", config, config)
    elif isinstance(config, PipelineConfig):
        own = config.self_train
        yield _supervised("SFT", config.sft.optimization)
        if not own.skip:
            yield RollingOut("self-training: rollouts", "self_train.rollouts", own.rollouts)
            yield _supervised("self-training: SFT", own.optimization)
        yield from _policy("rl.", config.rl, config)
        yield RollingOut("evaluation", "evaluate", config.evaluate, "loaded")


def _supervised(title: str, optimization: OptimizationConfig) -> Updating:
    return Updating(title, optimization, optimization.accumulation)


def _policy(
    prefix: str, rl: RLSettings, config: RLConfig | PipelineConfig
) -> Iterator[Updating | RollingOut]:
    held = {"beside": rl.optimization, "policy": rl.policy}
    yield RollingOut("P-GRPO: rollouts", f"{prefix}rollouts", rl.rollouts, **held)
    if config.report.validate_every is not None:
        yield RollingOut("P-GRPO: validation", "evaluate", config.evaluate, **held)
    yield Updating("P-GRPO", rl.optimization, None, rl.policy)
