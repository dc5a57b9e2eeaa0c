"""What a run holds in each of its phases, and whether its device has that much."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from threadweaver.device import DTYPES, choose, memory_of
from threadweaver.generate.settings import EngineSizes
from threadweaver.train.config import AdamWConfig, ComputeConfig, ConfigError, RunConfig
from threadweaver.train.memory.blueprint import architecture_of
from threadweaver.train.memory.optimizer import state_bytes, step_bytes
from threadweaver.train.memory.rollout import EngineBytes, EngineUse, count_engine
from threadweaver.train.memory.update import Passes, UpdateBytes, count_update
from threadweaver.train.policy_loss import PolicyConfig
from threadweaver.train.run_dir import device_of
from threadweaver.train.stages import PipelineConfig, RLConfig, SelfTrainConfig, SFTConfig

# Of the device's memory, for what no tensor shows: libraries, their workspaces, and what an
# allocator rounds up or cannot use.
SHARE_KEPT_FREE = 0.05

K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True)
class Part:
    """Bytes that a phase holds, and a remark."""

    name: str
    bytes: int
    note: str = ""


@dataclass(frozen=True)
class Phase:
    """What is on the device at a time.

    Attributes:
        parts: what there is in it.
        total: most that is held at once; less than the sum where parts are not there together.
        host: bytes that it holds on the host instead of the device.
        engine: its KV pages are those of this section of the settings, if it has any.
    """

    title: str
    parts: tuple[Part, ...]
    total: int
    host: int = 0
    engine: str | None = None


@dataclass(frozen=True)
class Target:
    """Where a run is to be.

    Attributes:
        device: "cpu" or "cuda".
        memory: bytes that it has.
        autocast: whether products are in bfloat16.
        parameters: dtype of what is trained.
    """

    device: str
    memory: int
    autocast: bool
    parameters: torch.dtype

    @property
    def usable(self) -> int:
        return int(self.memory * (1 - SHARE_KEPT_FREE))

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"


@dataclass(frozen=True)
class Plan:
    """The phases of a run, one after another, and where they are to be."""

    target: Target
    phases: tuple[Phase, ...]

    @property
    def fullest(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def fits(self) -> bool:
        return self.fullest.total <= self.target.usable


def target_of(compute: ComputeConfig) -> Target:
    """Where a run computes. A GPU that is not here can be planned for if its memory is named, and
    is taken for one that multiplies bfloat16.

    Raises:
        ConfigError: the device is not here, and device_gb not set.
    """
    named = compute.device_gb
    absent = compute.device == "cuda" and not torch.cuda.is_available()
    if absent and named is None:
        raise ConfigError(
            "compute.device is cuda, and there is none here: name the memory of the one to plan "
            "for, as --compute.device_gb 80"
        )
    if absent:
        kind, autocast = "cuda", compute.precision != "fp32"
    else:
        device = device_of(compute)
        kind = device.type
        precision = choose(device).precision if compute.precision == "auto" else compute.precision
        autocast = precision == "bf16"
    parameters = DTYPES[compute.parameters]
    memory = int(named * 1e9) if named is not None else memory_of(torch.device(kind))
    return Target(kind, memory, autocast or parameters == torch.bfloat16, parameters)


class Planner:
    """Plans of runs of one model, each of whose parts is counted once.

    Raises:
        ConfigError: there is no such model, or it cannot be trained on tries.
    """

    def __init__(self, config: RunConfig):
        self.architecture = architecture_of(config.model)
        self._updates: dict[Passes, UpdateBytes] = {}
        self._engines: dict[EngineUse, EngineBytes] = {}

    def plan(self, config: RunConfig) -> Plan:
        """Raises ConfigError for settings that cannot be."""
        target = target_of(config.compute)
        return Plan(target, tuple(self._phases(config, target)))

    def _phases(self, config: RunConfig, target: Target) -> Iterator[Phase]:
        recomputed = config.compute.gradient_checkpointing
        update = partial(self._update, target, recomputed)
        engine = partial(self._engine, target)
        if isinstance(config, SFTConfig):
            optimization = config.optimization
            yield update("SFT", optimization, optimization.accumulation > 1)
            if config.evaluate.data is not None:
                state, _ = self._state(optimization, target)
                parts = [Part("optimizer", state, optimization.optimizer)]
                if not target.on_gpu:
                    parts.append(Part("trained model", self._parameters(target.parameters)))
                yield engine(
                    "evaluation", "evaluate.engine", config.evaluate.engine, parts, trained=False
                )
        elif isinstance(config, SelfTrainConfig):
            sizes, optimization = config.rollouts.engine, config.optimization
            yield engine("rollouts", "rollouts.engine", sizes)
            yield update("SFT", optimization, optimization.accumulation > 1)
        elif isinstance(config, RLConfig):
            yield from self._policy_phases(config, config.policy, "", config, target)
        elif isinstance(config, PipelineConfig):
            sft, own, rl = config.sft.optimization, config.self_train, config.rl
            yield update("SFT", sft, sft.accumulation > 1)
            if not own.skip:
                name = "self_train.rollouts.engine"
                yield engine("self-training: rollouts", name, own.rollouts.engine)
                several = own.optimization.accumulation > 1
                yield update("self-training: SFT", own.optimization, several)
            yield from self._policy_phases(rl, rl.policy, "rl.", config, target)
            yield engine(
                "evaluation", "evaluate.engine", config.evaluate.engine, trained=False, cast=True
            )

    def _policy_phases(self, rl, policy: PolicyConfig, prefix: str, config, target: Target):
        state, _ = self._state(rl.optimization, target)
        held = [Part("optimizer", state, rl.optimization.optimizer)]
        reference = self._parameters(target.parameters) if policy.kl else 0
        if reference:
            held.append(Part("reference", reference, "policy.kl"))
        engines = [("P-GRPO: rollouts", f"{prefix}rollouts.engine", rl.rollouts.engine)]
        if config.report.validate_every is not None:
            engines.append(("P-GRPO: validation", "evaluate.engine", config.evaluate.engine))
        for title, name, sizes in engines:
            yield self._engine(target, title, name, sizes, held)
        yield self._update(
            target,
            config.compute.gradient_checkpointing,
            "P-GRPO",
            rl.optimization,
            True,
            policy=policy,
            reference=reference,
        )

    def _update(
        self,
        target: Target,
        recomputed: bool | int,
        title: str,
        optimization: AdamWConfig,
        sums_gradients: bool,
        policy: PolicyConfig | None = None,
        reference: int = 0,
    ) -> Phase:
        def counted(recomputed: bool | int) -> UpdateBytes:
            passes = Passes(
                optimization.batch_tokens,
                recomputed,
                target.parameters,
                target.autocast,
                target.on_gpu,
                policy is not None,
                policy is not None and policy.entropy > 0,
                sums_gradients,
            )
            return _kept(self._updates, passes, partial(count_update, self.architecture))

        found, without, with_all = counted(recomputed), counted(False), counted(True)
        state, host = self._state(optimization, target)
        step = step_bytes(optimization.optimizer, found.elements, target.parameters)
        most = max(found.peak, found.parameters + found.gradients + step)
        kept = f"{_gb(without.activations)} without recomputation, {_gb(with_all.activations)} with"
        parts = [
            Part("parameters", found.parameters, str(target.parameters).removeprefix("torch.")),
            Part("copies in bfloat16", found.copies),
            Part("gradients", found.gradients),
            Part("optimizer", state, optimization.optimizer),
            Part("reference", reference, "policy.kl"),
            Part("activations", found.activations, kept),
            Part("output layer's pieces", found.output_pieces),
        ]
        parts = [part for part in parts if part.bytes]
        title = f"{title}: update on {optimization.batch_tokens:,} tokens at a time"
        return Phase(title, tuple(parts), most + state + reference, host)

    def _engine(
        self,
        target: Target,
        title: str,
        section: str,
        sizes: EngineSizes,
        held: list[Part] | None = None,
        trained: bool = True,
        cast: bool = False,
    ) -> Phase:
        """`trained`: on the weights that are trained, else on ones that are loaded for it, in
        float32 or `cast` to the dtype of products."""
        dtype = target.parameters if trained else DTYPES["fp32"]
        if cast and target.autocast:
            dtype = DTYPES["bf16"]
        use = EngineUse(sizes, dtype, trained and target.autocast, target.on_gpu)
        found = _kept(self._engines, use, partial(count_engine, self.architecture))
        parts = [
            Part("parameters", found.parameters, str(dtype).removeprefix("torch.")),
            *(held or []),
            Part("rollout copy", found.copies, "bfloat16"),
            Part("KV pages", found.kv_pages, f"{section}.kv_gigabytes {sizes.kv_gigabytes:g}"),
            Part("a step", found.step, f"of {sizes.max_batch_tokens:,} tokens"),
        ]
        parts = [part for part in parts if part.bytes]
        return Phase(title, tuple(parts), sum(part.bytes for part in parts), engine=section)

    def _parameters(self, dtype: torch.dtype) -> int:
        return self._any_update(dtype).parameters

    def _state(self, optimization: AdamWConfig, target: Target) -> tuple[int, int]:
        elements = self._any_update(target.parameters).elements
        return state_bytes(optimization.optimizer, elements, target.parameters)

    def _any_update(self, dtype: torch.dtype) -> UpdateBytes:
        passes = Passes(1, False, dtype, False, False)
        return _kept(self._updates, passes, partial(count_update, self.architecture))


def _kept(found: dict[K, V], key: K, count) -> V:
    if key not in found:
        found[key] = count(key)
    return found[key]


def _gb(size: int) -> str:
    return f"{size / 1e9:,.2f} GB"
