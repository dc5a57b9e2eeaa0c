"""The settings with which a run that does not fit would."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any, NamedTuple, TypeVar

from threadweaver.generate.settings import EngineSizes
from threadweaver.train.config import AdamWConfig, RunConfig
from threadweaver.train.memory.plan import Phase, Plan
from threadweaver.train.memory.planner import LEAST_TOKENS, Planner

S = TypeVar("S")
_LEAST_KV = 5e8  # bytes; fewer pages make rollouts wait for each other


class Change(NamedTuple):
    """Settings, by dotted name, and their values."""

    settings: dict[str, Any]

    def apply(self, config: RunConfig) -> RunConfig:
        """A copy of the settings with these."""
        config = copy.deepcopy(config)
        for name, value in self.settings.items():
            *parents, leaf = name.split(".")
            owners: list[Any] = [config]
            for parent in parents:
                owners.append(getattr(owners[-1], parent))
            if isinstance(owners[-1], EngineSizes):  # frozen
                value = replace(owners.pop(), **{leaf: value})
                leaf = parents[-1]
            setattr(owners[-1], leaf, value)
        return config

    def __str__(self) -> str:
        return " ".join(f"--{name} {_text(value)}" for name, value in self.settings.items())


def advice(planner: Planner, config: RunConfig) -> tuple[list[Change], Plan] | None:
    """Changes with which the run fits, none of which can be left out, those first that cost least;
    and its plan with them. None: there are none."""
    plan = planner.plan(config)
    changes: list[Change] = []
    changed = config
    while not plan.fits:
        change = next(_changes(changed, plan), None)
        if change is None:
            return None
        changes.append(change)
        changed = change.apply(changed)
        plan = planner.plan(changed)
    for change in changes[:-1]:
        fewer = [other for other in changes if other is not change]
        if (without := planner.plan(_with(config, fewer))).fits:
            changes, plan = fewer, without
    return changes, plan


def _with(config: RunConfig, changes: list[Change]) -> RunConfig:
    for change in changes:
        config = change.apply(config)
    return config


def _changes(config: RunConfig, plan: Plan) -> Iterator[Change]:
    """What would make the fullest phase smaller, in the order of what it costs."""
    compute, phase = config.compute, plan.fullest
    optimizations = _sections(config, AdamWConfig)
    if phase.engine is not None:
        yield from _smaller_pool(config, plan, phase)
    elif compute.gradient_checkpointing is not True:
        yield Change({"compute.gradient_checkpointing": True})
    if any(found.optimizer == "adamw" for found in optimizations.values()):
        yield _all(optimizations, "optimizer", "adamw-8bit")
    if plan.target.on_gpu and compute.parameters == "fp32" and compute.precision != "fp32":
        yield Change({"compute.parameters": "bf16"})
    if (
        plan.target.ranks == 1  # on several it is refused
        and plan.target.on_gpu
        and any(found.optimizer != "adamw-offload" for found in optimizations.values())
    ):
        yield _all(optimizations, "optimizer", "adamw-offload")
    if phase.engine is None and plan.target.on_gpu and not compute.activation_offload:
        yield Change({"compute.activation_offload": True})
    tokens = compute.pass_tokens or max(found.batch_tokens for found in optimizations.values())
    # On a GPU, what is not set is chosen.
    chosen = plan.target.on_gpu and compute.pass_tokens is None
    if phase.engine is None and not chosen and tokens // 2 >= LEAST_TOKENS:
        yield Change({"compute.pass_tokens": tokens // 2})


def _smaller_pool(config: RunConfig, plan: Plan, phase: Phase) -> Iterator[Change]:
    """The KV pages that what else there is leaves room for."""
    assert phase.engine is not None
    sizes, pages = _sections(config, EngineSizes)[phase.engine], phase.part("KV pages")
    room = plan.target.usable - (phase.total - pages)
    if not _LEAST_KV <= room < pages:
        return
    if plan.target.on_gpu and sizes.kv_gigabytes != "auto":
        yield Change({f"{phase.engine}.kv_gigabytes": "auto"})
    elif not plan.target.on_gpu:
        yield Change({f"{phase.engine}.kv_gigabytes": int(room / 1e8) / 10})


def _all(sections: dict[str, Any], leaf: str, value: Any) -> Change:
    return Change({f"{name}.{leaf}": value for name in sections})


def _sections(config: Any, kind: type[S], prefix: str = "") -> dict[str, S]:
    """The sections of one kind in some settings, by dotted name."""
    found: dict[str, S] = {}
    for field in fields(config):
        value, name = getattr(config, field.name), f"{prefix}{field.name}"
        if isinstance(value, kind):
            found[name] = value
        elif is_dataclass(value):
            found |= _sections(value, kind, f"{name}.")
    return found


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
