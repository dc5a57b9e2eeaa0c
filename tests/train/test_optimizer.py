"""Optimizers with less state, and parameters in bfloat16: training, checkpoints, errors."""

from __future__ import annotations

import importlib.util
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.train.conftest import ARCH, weights_of_resumed
from threadweaver.generate.weights import EngineWeights
from threadweaver.model import build_tokenizer, new_model
from threadweaver.train.checkpoint import check_room
from threadweaver.train.config import AdamWConfig, ConfigError, OptimizerName
from threadweaver.train.optimizer import build_optimizer, clip_gradient, set_learning_rate
from threadweaver.train.sharded_checkpoint import (
    load_optimizer,
    save_shards,
    take_whole_optimizer,
)

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


NAMES_AND_DTYPES = [
    pytest.param("adamw", torch.float32, id="adamw"),
    pytest.param("adamw-8bit", torch.float32, id="adamw-8bit", marks=needs_torchao),
    pytest.param("adamw", torch.bfloat16, id="bf16", marks=needs_torchao),
    pytest.param("adamw-8bit", torch.bfloat16, id="adamw-8bit of bf16", marks=needs_torchao),
]


def matrices(name: OptimizerName, dtype: torch.dtype):
    """A model, always the same, and an optimizer of it that has taken no step."""
    torch.manual_seed(0)
    model = torch.nn.Linear(256, 256).to(dtype)
    settings = AdamWConfig(optimizer=name, weight_decay=0.1)
    return model, build_optimizer(model, settings)  # pyright: ignore[reportArgumentType]


def weights_after_a_step(model, optimizer) -> torch.Tensor:
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.3)
    set_learning_rate(optimizer, 1e-3)
    optimizer.step()
    return model.weight.detach().clone()


@pytest.mark.parametrize(("name", "dtype"), NAMES_AND_DTYPES)
def test_a_checkpoint_before_the_first_update_changes_nothing(name, dtype, tmp_path, eager):
    """Neither what is saved of several ranks nor what goes on from it: as after batches of P-GRPO
    in which nothing has a signal."""
    new = matrices(name, dtype)
    of_one_process = new[1].state_dict()
    expected = weights_after_a_step(*new)
    saved = matrices(name, dtype)
    save_shards(tmp_path / "step-1", *saved)
    assert torch.equal(weights_after_a_step(*saved), expected)
    loaded = matrices(name, dtype)
    load_optimizer(tmp_path / "step-1", *loaded)
    assert torch.equal(weights_after_a_step(*loaded), expected)
    taken = matrices(name, dtype)
    take_whole_optimizer(of_one_process, *taken)
    assert torch.equal(weights_after_a_step(*taken), expected)


def check_room_is_what_a_checkpoint_takes(
    name: OptimizerName, dtype: torch.dtype, folder: Path, monkeypatch
) -> None:
    """Checks it against the files of a model after a step, but for what files have on top."""
    model, optimizer = matrices(name, dtype)
    (1000 * model(torch.ones(1, 256, dtype=dtype))).sum().backward()
    optimizer.step()
    save_file(model.state_dict(), folder / "weights")
    torch.save(optimizer.state_dict(), folder / "moments")
    size = sum((folder / file).stat().st_size for file in ("weights", "moments"))
    usage = namedtuple("usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(size))
    check_room(folder, model, name, count=1)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(0.95 * size))
    with pytest.raises(ConfigError, match="1 checkpoints"):
        check_room(folder, model, name, count=1)


@pytest.mark.parametrize(("name", "dtype"), NAMES_AND_DTYPES)
def test_the_room_for_a_checkpoint_is_what_it_takes(name, dtype, tmp_path, monkeypatch, eager):
    check_room_is_what_a_checkpoint_takes(name, dtype, tmp_path, monkeypatch)


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
