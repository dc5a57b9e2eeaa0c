"""What the memory plan counts: of adapters, passes, ranks and pools, against what there is."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from tests.architecture import SMALL
from tests.train.memory.test_plan import arch
from threadweaver.generate.settings import EngineSizes
from threadweaver.model import fused
from threadweaver.train import trainer
from threadweaver.train.config import (
    ComputeConfig,
    ConfigError,
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimizationConfig,
)
from threadweaver.train.memory import first_layers, update
from threadweaver.train.memory.advice import advice
from threadweaver.train.memory.blueprint import Architecture, architecture_of
from threadweaver.train.memory.choice import PassChoice, choose_pass_tokens
from threadweaver.train.memory.passes import Passes
from threadweaver.train.memory.plan import Phase
from threadweaver.train.memory.planner import Planner
from threadweaver.train.memory.rollout import EngineUse, count_engine
from threadweaver.train.memory.update import count_update
from threadweaver.train.stages import PipelineConfig, RLConfig, SFTConfig
from threadweaver.trajectory import TAGS

BF16, FP32 = torch.bfloat16, torch.float32
DEEP = {**SMALL, "num_hidden_layers": 5, "max_position_embeddings": 4096}
WIDE = arch(128, 2)
ONE_TOKEN = Passes(1, False, FP32, False, False)


def architecture(lora: LoraConfig | None = None, **fields) -> Architecture:
    return architecture_of(ModelConfig(arch={**DEEP, **fields}, lora=lora))


def sft(fields: dict, lora: LoraConfig | None = None, tokens: int = 4096, **compute) -> SFTConfig:
    return SFTConfig(
        run_dir="unused",
        model=ModelConfig(arch=fields, lora=lora),
        data=DataConfig(train="unused"),
        optimization=OptimizationConfig(batch_tokens=tokens, accumulation=4),
        compute=ComputeConfig(**{"device": "cpu", "precision": "fp32", **compute}),
    )


def on_gpu(fields: dict, gigabytes: float, **others) -> SFTConfig:
    return sft(fields, device="cuda", precision="bf16", device_gb=gigabytes, **others)


def update_of(config: SFTConfig | RLConfig) -> Phase:
    return Planner(config).plan(config).phases[-1]


@pytest.mark.parametrize(
    ("passes", "lora"),
    [
        (Passes(100, True, FP32, True, True, policy=True, sums_gradients=True), None),
        (Passes(100, True, BF16, True, True, sharded=True, offloaded=True), None),
        (Passes(100, 3, FP32, False, False), None),
        (Passes(100, True, BF16, True, True), LoraConfig(rank=4, targets=["q_proj"])),
    ],
)
def test_two_and_three_layers_tell_what_equal_ones_hold(passes, lora, monkeypatch):
    of = architecture(lora, tie_word_embeddings=True)
    found = count_update(of, passes)
    runs = []

    def all_layers(model, is_uniform, run):
        runs.append(run())
        return runs[-1]

    monkeypatch.setattr(update, "of_all_layers", all_layers)
    assert found == count_update(of, passes) and len(runs) == 1


def test_layers_that_differ_are_all_run():
    of = architecture(model_type="qwen3")
    with update.counting(of, FP32, on_gpu=False) as blueprint:
        model, seen = blueprint.model, []
        layers = model.model.layers
        layers[1].mlp.up_proj.weight.requires_grad_(False)
        first_layers.of_all_layers(model, True, lambda: seen.append(len(list(layers))))
        layers[1].mlp.up_proj.weight.requires_grad_(True)
    assert seen == [5]


def test_adapters_have_all_gradients_and_the_base_has_none():
    """In float32, whatever the base is in."""
    lora, passes = (
        LoraConfig(rank=4, targets=["q_proj", "down_proj"]),
        Passes(16, False, BF16, True, False),
    )
    of = architecture_of(ModelConfig(arch=WIDE, lora=lora))
    of_layer = (128 + 2 * 64) + (384 + 128)  # rows and columns
    rows_of_tags = 2 * len(TAGS) * 128
    found = count_update(of, passes)
    assert (
        found.gradients
        == 4 * (2 * 4 * of_layer + rows_of_tags)
        == 4 * sum(map(math.prod, found.shapes))
    )
    base = count_update(architecture_of(ModelConfig(arch=WIDE)), passes)
    ids = 8 * len(TAGS)
    assert found.parameters == base.parameters + found.gradients + ids


def test_the_reference_of_adapters_takes_no_memory():
    config = RLConfig(
        run_dir="unused",
        model=ModelConfig(arch=SMALL, lora=LoraConfig(targets=["q_proj"])),
        compute=ComputeConfig(device="cpu", precision="fp32"),
    )
    config.policy.kl = 0.1
    config.optimization.batch_tokens = 16
    assert not any(phase.part("reference") for phase in Planner(config).plan(config).phases)


def test_norms_that_are_left_to_the_rotation_are_counted_as_on_a_gpu(monkeypatch):
    """Queries and keys are kept as they were projected and as they were rotated: in neither way
    more than with kernels of their own, which keep a number a head too."""
    pytest.importorskip("triton")
    passes = Passes(64, False, FP32, autocast=True, on_gpu=True)
    of = architecture(model_type="qwen3")
    found = count_update(of, passes)
    monkeypatch.setattr(fused, "deferrable_norms", lambda module, sizes: None)
    apart = count_update(of, passes)
    heads = DEEP["num_attention_heads"] + DEEP["num_key_value_heads"]
    assert apart.activations - found.activations == 4 * 64 * heads * DEEP["num_hidden_layers"]
    assert apart.gradients == found.gradients and apart.parameters == found.parameters


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4, targets=["q_proj"])])
def test_an_engine_doubles_no_parameters_in_bfloat16_but_those_with_adapters(lora):
    of = architecture(lora)
    use = EngineUse(EngineSizes(max_batch_tokens=16, max_sequences=4), BF16, True, False)
    heads, item = DEEP["num_attention_heads"] * DEEP["head_dim"], 2
    of_targets = 5 * heads * DEEP["hidden_size"] * item
    rows_of_tags = len(TAGS) * DEEP["hidden_size"] * item
    assert count_engine(of, use).copies == (of_targets + rows_of_tags if lora else 0)


def test_an_engine_with_merged_adapters_is_counted_apart_from_one_beside_them():
    config = PipelineConfig(
        run_dir="unused",
        model=ModelConfig(arch=SMALL, lora=LoraConfig(rank=4, targets=["q_proj"])),
        compute=ComputeConfig(device="cpu", precision="fp32"),
    )
    config.sft.optimization.batch_tokens = config.self_train.optimization.batch_tokens = 16
    config.rl.optimization.batch_tokens = 16
    config.evaluate.engine = config.rl.rollouts.engine
    phases = Planner(config).plan(config).phases
    trained, merged = (
        next(phase for phase in phases if phase.title == title)
        for title in ("P-GRPO: rollouts", "evaluation")
    )
    whole = count_update(architecture_of(ModelConfig(arch=SMALL)), ONE_TOKEN).parameters
    assert merged.part("rollout copy") == 0 < trained.part("rollout copy")
    assert merged.part("parameters") == whole < trained.part("parameters")


def test_ranks_share_parameters_gradients_and_moments():
    fields = WIDE
    alone = update_of(on_gpu(fields, 80, tokens=64))
    four = update_of(on_gpu(fields, 80, tokens=64, ranks=4))
    for name in ("parameters", "gradients", "optimizer"):
        assert four.part(name) == pytest.approx(alone.part(name) / 4, rel=0.01)
    assert four.part("copies in bfloat16") == 0 < four.part("gathered parameters")


def test_ranks_of_torchrun_are_planned_for_and_a_setting_overrides_them(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    config = sft(SMALL, tokens=16)
    four = Planner(config).plan(config).target
    config.compute = replace(config.compute, ranks=1)
    one = Planner(config).plan(config).target
    assert (four.ranks, one.ranks) == (4, 1)
    assert four.memory == one.memory // 2  # of a host with two of them


def test_each_rank_gathers_all_weights_to_roll_out():
    config = RLConfig(
        run_dir="unused",
        model=ModelConfig(arch=WIDE),
        compute=ComputeConfig(device="cuda", precision="bf16", device_gb=80, ranks=2),
    )
    config.optimization.batch_tokens = 64
    rollouts, update = Planner(config).plan(config).phases
    # All of them in bfloat16, and half of them in float32.
    assert rollouts.part("parameters") == pytest.approx(update.part("parameters"), rel=0.01)
    assert rollouts.part("trained parameters") == pytest.approx(update.part("parameters"), rel=0.01)
    assert rollouts.part("rollout copy") == 0


def test_a_pass_of_few_tokens_has_the_activations_of_few():
    fields = arch(128, 2)
    whole, few = update_of(sft(fields)), update_of(sft(fields, pass_tokens=1024))
    assert few.part("activations") == pytest.approx(whole.part("activations") / 4, rel=0.02)
    assert "in passes of 1,024" in few.title and "in passes" not in whole.title


def test_a_run_on_a_gpu_chooses_passes_with_which_its_update_fits():
    fields = WIDE
    whole = update_of(on_gpu(fields, 80)).total
    config = on_gpu(fields, 0.6 * whole / 1e9)
    choice = choose_pass_tokens(config)
    assert choice.tokens is not None and 1024 <= choice.tokens < 4096
    assert choice.note is not None and f"{choice.tokens:,}" in choice.note
    plan = Planner(config).plan(config)
    assert plan.fits and f"in passes of {choice.tokens:,}" in plan.phases[0].title
    more = replace(config.compute, pass_tokens=choice.tokens + 600)
    assert not Planner(config).plan(replace(config, compute=more)).fits
    assert choose_pass_tokens(on_gpu(fields, 80)) == (None, None)


def test_passes_that_do_not_fit_whatever_they_are_are_the_fewest_and_said_so():
    choice = choose_pass_tokens(on_gpu(WIDE, 0.01))
    assert choice.tokens == 1024
    assert choice.note is not None and "does not fit" in choice.note


def test_a_run_chooses_for_where_it_is_and_not_for_what_plan_is_asked_about(monkeypatch):
    asked = []

    def choose(config):
        asked.append((config.compute.device_gb, config.compute.ranks))
        return PassChoice(1024, None)

    monkeypatch.setattr(trainer, "choose_pass_tokens", choose)
    run = SimpleNamespace(
        config=on_gpu(WIDE, 80, ranks=4), device=torch.device("cuda"), console=Console(stderr=True)
    )
    assert trainer.Trainer._settle_passes(run) == 1024  # pyright: ignore[reportArgumentType]
    assert asked == [(None, None)]


def test_compiled_layers_have_no_copies_of_their_weights():
    """Each casts them when it runs, and keeps them for its backward pass unless recomputed."""
    fields = arch(256, 8)
    plain, compiled, recomputed = (
        update_of(on_gpu(fields, 80, tokens=64, compile=compiled, gradient_checkpointing=again))
        for compiled, again in ((False, True), (True, False), (True, True))
    )
    embedding = recomputed.part("copies in bfloat16")  # the output layer's, as large
    matrices = plain.part("copies in bfloat16") - embedding
    in_float32 = plain.part("parameters") - 2 * (2 * embedding)
    assert embedding > 0 and 2 * matrices == pytest.approx(in_float32, rel=0.01)
    kept = compiled.part("activations") - recomputed.part("activations")
    assert matrices < kept < 2 * matrices
    assert recomputed.part("activations") == plain.part("activations")
    assert recomputed.total < plain.total


def test_sft_evaluates_in_the_dtype_of_products_without_moments():
    """As a pipeline does. What was trained stays on the host, or divided among ranks."""
    for config, dtype, kept in (
        (sft(WIDE, tokens=64), 1, 1),
        (on_gpu(WIDE, 80, tokens=64), 0.5, 0),
        (on_gpu(WIDE, 80, tokens=64, ranks=2), 0.5, 0.5),
    ):
        config.evaluate.data = "unused"
        evaluation = Planner(config).plan(config).phases[-1]
        whole = count_update(architecture_of(ModelConfig(arch=WIDE)), ONE_TOKEN).parameters
        assert evaluation.title == "evaluation" and evaluation.part("optimizer") == 0
        assert evaluation.part("parameters") == pytest.approx(dtype * whole, rel=0.01)
        assert evaluation.part("trained parameters") == pytest.approx(kept * whole, rel=0.01)


def test_offloaded_activations_are_on_the_host():
    fields = WIDE
    here = update_of(on_gpu(fields, 80, gradient_checkpointing=True))
    there = update_of(on_gpu(fields, 80, gradient_checkpointing=True, activation_offload=True))
    moved = here.part("activations") - there.part("activations")
    assert moved > 0.7 * here.part("activations")
    assert moved <= there.host <= 2.2 * moved  # in powers of two


def test_pages_of_auto_fill_what_a_phase_leaves_of_a_gpu():
    config = RLConfig(
        run_dir="unused",
        model=ModelConfig(arch={**WIDE, "max_position_embeddings": 100_000}),
        compute=ComputeConfig(device="cuda", precision="bf16", device_gb=2),
    )
    config.optimization.batch_tokens = 64
    plan = Planner(config).plan(config)
    rollouts = plan.phases[0]
    assert plan.fits and rollouts.total > 0.9 * plan.target.usable
    assert rollouts.tokens > 100_000


@pytest.mark.parametrize("name", ["qwen3", "llama", "gemma2"])
@pytest.mark.parametrize("use_gpu", [False, True])
def test_what_is_set_aside_for_a_step_is_at_least_what_it_takes(name, use_gpu):
    of = architecture_of(ModelConfig(arch={**WIDE, "model_type": name}))
    for sizes in (EngineSizes(max_batch_tokens=4096), EngineSizes(max_sequences=256)):
        found = count_engine(of, EngineUse(sizes, FP32, use_gpu, use_gpu))
        assert found.step <= found.pages.set_aside < 8 * found.step


def test_what_ranks_cannot_share_out_has_no_plan():
    config = on_gpu(SMALL, 80, tokens=16, ranks=3)
    with pytest.raises(ConfigError, match=r"accumulation is 4, and there are 3 ranks"):
        Planner(config).plan(config)
    config = on_gpu(SMALL, 80, tokens=16, ranks=2)
    config.optimization.optimizer = "adamw-offload"
    with pytest.raises(ConfigError, match="not been tried on several ranks"):
        Planner(config).plan(config)


def test_ranks_that_lack_memory_are_told_of_moments_of_8_bits():
    config = on_gpu(WIDE, 80, tokens=16, gradient_checkpointing=True, ranks=2)
    eight = copy.deepcopy(config)
    eight.optimization.optimizer = "adamw-8bit"
    most, least = update_of(config), update_of(eight)
    saved = most.part("optimizer") - least.part("optimizer")
    assert 0.3 * most.part("optimizer") < saved <= most.total - least.total
    config.compute.device_gb = (most.total + least.total) / 2 / 0.95 / 1e9
    found = advice(Planner(config), config)
    assert found is not None
    assert [str(change) for change in found[0]] == ["--optimization.optimizer adamw-8bit"]


def test_ranks_have_all_adapters_and_a_share_of_the_base():
    alone, two = (
        update_of(on_gpu(WIDE, 80, lora=LoraConfig(rank=4), tokens=16, ranks=ranks))
        for ranks in (1, 2)
    )
    for name in ("gradients", "optimizer"):
        assert two.part(name) == alone.part(name)
    base = alone.part("parameters") - alone.part("gradients")
    assert two.part("parameters") - two.part("gradients") == pytest.approx(base / 2, rel=0.01)
