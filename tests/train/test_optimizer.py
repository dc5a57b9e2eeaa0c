"""Optimizers with less state, and parameters in bfloat16: training, checkpoints, errors."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from safetensors.torch import load_file

from tests.train.conftest import ARCH, weights_of_resumed
from threadweaver.generate.weights import EngineWeights
from threadweaver.model import build_tokenizer, new_model
from threadweaver.train.optimizer import clip_gradient

needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="needs the extra memory"
)
KINDS = {
    "adamw-8bit": ({"optimizer": "adamw-8bit"}, {}),
    "bf16": ({}, {"parameters": "bf16", "precision": "bf16"}),
    "adamw-8bit of bf16": ({"optimizer": "adamw-8bit"}, {"parameters": "bf16"}),
}


def run_of(new_run, name: str, kind: str):
    run = new_run(name)
    optimization, compute = KINDS[kind]
    run.settings["compute"].pop("precision")
    run.settings["compute"] |= compute or {"precision": "fp32"}
    run.settings["optimization"] |= optimization
    return run


@needs_torchao
@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_and_resumes_bit_for_bit(kind, new_run, eager):
    whole = run_of(new_run, "whole", kind)
    assert whole() == 0
    losses = [record["loss"] for record in whole.metrics()]
    assert losses[-1] < 0.9 * losses[0]
    stopped = run_of(new_run, "stopped", kind)
    assert weights_of_resumed(stopped) == whole.weights()
    dtype = torch.bfloat16 if "bf16" in kind else torch.float32
    weights = load_file(stopped.folder / "checkpoints/step-6/model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {dtype}


@needs_torchao
def test_a_step_too_small_for_bfloat16_is_taken_on_average():
    """Stochastic rounding: weights of 1 move by a hundredth of the distance between values."""
    from torchao.optim.quant_utils import (  # pyright: ignore[reportMissingImports]
        _fp32_to_bf16_sr,
    )

    moved = _fp32_to_bf16_sr(torch.full((1 << 16,), 1 - 2**-8 / 100)).double()
    assert (1 - moved.mean()).item() == pytest.approx(2**-8 / 100, rel=0.2)


def test_what_cannot_be_is_one_line(new_run, fails, monkeypatch):
    run = new_run()
    run.settings["optimization"]["optimizer"] = "adamw-offload"
    assert "optimization.optimizer is adamw-offload" in fails(run(), 2)
    run.settings["optimization"]["optimizer"] = "adamw"
    run.settings["compute"] |= {"parameters": "bf16", "precision": "fp32"}
    assert "compute.parameters is bf16" in fails(run(), 2)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for section, name, value in (
        ("compute", "parameters", "bf16"),
        ("optimization", "optimizer", "adamw-8bit"),
    ):
        run = new_run()
        run.settings[section] |= {name: value}
        run.settings["compute"].pop("precision")
        assert "threadweaver[memory]" in fails(run(), 2)
    assert not run.folder.exists()


def test_an_engine_shares_the_memory_of_parameters_in_bfloat16():
    model = new_model(build_tokenizer(), ARCH)
    torch.nn.Module.to(model, torch.bfloat16)
    weights = EngineWeights(model, torch.bfloat16)
    weights.cast()
    own = {p.data_ptr() for p in weights.model.parameters()}
    assert own == {p.data_ptr() for p in model.parameters()}


@pytest.mark.gpu
@needs_torchao
def test_an_offloaded_step_is_clipped():
    """The copies of gradients on the host are scaled as those on the GPU."""
    from torchao.optim import CPUOffloadOptimizer  # pyright: ignore[reportMissingImports]

    model = torch.nn.Linear(128, 64, bias=False, device="cuda")
    optimizer = CPUOffloadOptimizer([model.weight], torch.optim.AdamW)
    (1000 * model(torch.randn(8, 128, device="cuda"))).sum().backward()
    clip_gradient(model, optimizer, 1.0)  # pyright: ignore[reportArgumentType]
    (host,) = optimizer.param_d2h_map.values()
    assert model.weight.grad is not None and host.grad is not None
    assert model.weight.grad.norm().item() == pytest.approx(1, rel=1e-4)
    torch.testing.assert_close(host.grad, model.weight.grad.cpu())
