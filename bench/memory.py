"""`python -m bench memory [--models 0.6B,8B] [--device_gb 80] > docs/memory.md`: what SFT and
P-GRPO of Qwen3's sizes hold on a GPU at the published settings, as `--plan` counts it.

Nothing is measured here, and no GPU is needed.
"""

from __future__ import annotations

import json
import math
import tempfile
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser
from rich.console import Console

from bench.environment import environment
from bench.models import SHAPES, check_names
from bench.suite import UsageError
from threadweaver.command import explain, fail, quiet
from threadweaver.generate.settings import EngineSizes, GenerationSettings
from threadweaver.progress import Progress
from threadweaver.train.config import (
    ComputeConfig,
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimizationConfig,
    OptimizerName,
)
from threadweaver.train.memory.plan import Plan
from threadweaver.train.memory.planner import Planner
from threadweaver.train.stages import RLConfig, RLOptimizationConfig, RLRollouts, SFTConfig

CONTEXT = 40_960  # tokens, of the published runs: of a pack, and of a response
ENGINE = EngineSizes(page_size=64, max_sequences=256, max_batch_tokens=8192)


@dataclass(frozen=True)
class Setup:
    """How a model is trained.

    Attributes:
        title: heading of a column.
    """

    title: str
    parameters: Literal["fp32", "bf16"] = "fp32"
    optimizer: OptimizerName = "adamw"
    lora: LoraConfig | None = None
    ranks: int = 1

    def compute(self, gigabytes: float) -> ComputeConfig:
        return ComputeConfig(
            device="cuda",
            precision="bf16",
            parameters=self.parameters,
            device_gb=gigabytes,
            ranks=self.ranks,
            gradient_checkpointing=True,
        )


SETUPS = (
    Setup("1 GPU, float32, AdamW"),
    Setup("1 GPU, bfloat16, 8-bit AdamW", "bf16", "adamw-8bit"),
    Setup("1 GPU, bfloat16, AdamW on the host", "bf16", "adamw-offload"),
    Setup("1 GPU, LoRA, bfloat16", "bf16", lora=LoraConfig(rank=32, alpha=64.0)),
    Setup("8 GPUs, float32, AdamW", ranks=8),
)


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    parser = ArgumentParser(prog="python -m bench memory", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--models", default="0.6B,1.7B,4B,8B,14B,32B", help="Names, by comma.")
    parser.add_argument("--device_gb", type=float, default=80.0, help="Memory of a GPU, 1e9 bytes.")
    try:
        options = parser.parse_args(arguments)
        models = options.models.split(",")
        check_names(models)
        if not 0 < options.device_gb < math.inf:
            raise UsageError(f"--device_gb is {options.device_gb:g}: it must be above 0 and finite")
    except ArgumentError as error:
        return fail(explain(str(error), parser.get_defaults()), 2)
    except UsageError as error:
        return fail(error, 2)
    quiet()
    console, cells = Console(stderr=True), list(_cells(models))
    with Progress(console, "planning", len(cells), "setups") as progress:
        plans = {
            (model, setup.title): plans_of(model, setup, options.device_gb)
            for model, setup in progress.track(cells)
        }
    print("\n".join(document(models, plans, options.device_gb)))
    return 0


@dataclass(frozen=True)
class Plans:
    """Of a model in a setup.

    Attributes:
        whole_sft, whole_rl: with the pack of a step in one pass.
        sft, rl: with passes as a run chooses them.
    """

    whole_sft: Plan
    sft: Plan
    whole_rl: Plan
    rl: Plan


def _cells(models: Sequence[str]) -> Iterator[tuple[str, Setup]]:
    return ((model, setup) for model in models for setup in SETUPS)


def plans_of(model: str, setup: Setup, gigabytes: float) -> Plans:
    """What a run of a model in SHAPES holds."""
    compute = setup.compute(gigabytes)
    whole = replace(compute, pass_tokens=CONTEXT)
    with tempfile.TemporaryDirectory() as folder:
        config = {"model_type": "qwen3", "max_position_embeddings": CONTEXT, **SHAPES[model]}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        of_model = ModelConfig(path=folder, lora=setup.lora)
        accumulation = max(1, setup.ranks)
        sft = SFTConfig(
            run_dir="unused",
            model=of_model,
            data=DataConfig(train="unused"),
            optimization=OptimizationConfig(optimizer=setup.optimizer, accumulation=accumulation),
        )
        rollouts = RLRollouts(generation=GenerationSettings(max_tokens=CONTEXT), engine=ENGINE)
        rl = RLConfig(
            run_dir="unused",
            model=of_model,
            rollouts=rollouts,
            optimization=RLOptimizationConfig(optimizer=setup.optimizer),
        )
        planner = Planner(sft)
    found: list[Plan] = []
    for config in (sft, rl):
        at_once = planner.plan(replace(config, compute=whole))
        fits = at_once.phases[-1].total <= at_once.target.usable
        found += [at_once, at_once if fits else planner.plan(replace(config, compute=compute))]
    return Plans(*found)


def document(
    models: Sequence[str], plans: dict[tuple[str, str], Plans], gigabytes: float
) -> Iterator[str]:
    """Lines of Markdown."""
    gpu, env = f"{gigabytes:g} GB", environment("cpu")
    commit = f"{(env['commit'] or 'unknown')[:9]}{'-dirty' if env['dirty'] else ''}"
    yield "# Memory of Qwen3 models"
    yield ""
    yield (
        f"What a GPU holds at most in an update of the weights, in GB, with packs of {CONTEXT:,} "
        "tokens, as published, and recomputed activations: counted by `--plan`, not measured. "
        f"**Bold** fits {gpu}, of which 5 % are kept free. *In passes of N* fits when tries are "
        "computed in several passes, as a run then does by itself (compute.pass_tokens), if no "
        "path is longer."
    )
    yield ""
    yield (
        f"Made by `{env['command']} > docs/memory.md`, commit {commit}, {env['date'][:10]}; the "
        "figures do not depend on the machine that counts."
    )
    for title, stage in (("SFT", "sft"), ("P-GRPO", "rl")):
        yield from ("", f"## {title}", "")
        yield from _table(models, lambda m, s, stage=stage: _update(plans[m, s.title], stage))
    yield from ("", "## Rollouts of P-GRPO", "")
    yield (
        f"Tokens whose keys and values fit what is left of {gpu} while {ENGINE.max_sequences} "
        f"sequences decode (kv_gigabytes auto); a response has up to {CONTEXT:,}."
    )
    yield ""
    yield from _table(models, lambda m, s: _tokens(plans[m, s.title].rl))


def _table(models: Sequence[str], cell: Callable[[str, Setup], str]) -> Iterator[str]:
    yield "| | " + " | ".join(setup.title for setup in SETUPS) + " |"
    yield "|---|" + "---:|" * len(SETUPS)
    for model in models:
        yield f"| {model} | " + " | ".join(cell(model, setup) for setup in SETUPS) + " |"


def _update(plans: Plans, stage: str) -> str:
    whole: Plan = getattr(plans, f"whole_{stage}")
    phase = whole.phases[-1]
    gigabytes = f"{phase.total / 1e9:,.0f}"
    if phase.total <= whole.target.usable:
        return f"**{gigabytes}**"
    split: Plan = getattr(plans, stage)
    chosen = split.phases[-1]
    if chosen.total <= split.target.usable:
        return f"{gigabytes}, *in passes of {chosen.tokens:,}*"
    return gigabytes


def _tokens(plan: Plan) -> str:
    phase = plan.phases[0]
    if phase.total > plan.target.usable:
        return "none"
    return f"{phase.tokens:,}"
