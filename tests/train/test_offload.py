"""Activations on the host: which, that nothing else is, and that no bit of a gradient changes.

There is no GPU in most of these: a CPU tensor that was moved is another CPU tensor.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.train.test_rl import new_run as new_rl_run
from threadweaver.model import WeightCopies, build_tokenizer, new_model, trie_loss
from threadweaver.train import run, trainer
from threadweaver.train.memory.live import LiveBytes
from threadweaver.train.offload import ActivationOffload
from threadweaver.train.setup import compile_layers, recompute_activations
from tw_kernels import Trie

__all__ = ["new_rl_run"]  # a fixture

HIDDEN, LAYERS, HEADS, HEAD_DIM = 64, 4, 4, 16
ARCH = {
    "model_type": "qwen3",
    "hidden_size": HIDDEN,
    "intermediate_size": 160,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": HEAD_DIM,
    "tie_word_embeddings": True,
}
PATHS = [[5, 8, 13, *range(20, 60)], [5, 8, 13, *range(60, 90)], [7, 9]]
TRIE = Trie.from_paths(PATHS, [[1.0] * len(path) for path in PATHS])


class Host(ActivationOffload):
    """Remembers what it moves, to where `LiveBytes` does not look."""

    def __init__(self, model):
        super().__init__(model, least_bytes=1000)
        self.moved: list[int] = []

    def to_host(self, tensor: Tensor) -> Any:
        self.moved.append(tensor.untyped_storage().data_ptr())
        return tensor.dtype, tensor.float().numpy().copy()

    def to_device(self, stored: Any) -> Tensor:
        dtype, copy = stored
        return torch.from_numpy(copy).to(dtype)


def gradients(model, offload: ActivationOffload | None) -> dict[str, Tensor]:
    model.zero_grad()
    if offload is None:
        loss = trie_loss(model, TRIE)
    else:
        with offload.forward_pass():
            loss = trie_loss(model, TRIE)
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("recomputed", [False, 1, True])
def test_gradients_are_the_same_bit_for_bit(recomputed):
    model = new_model(build_tokenizer(), ARCH, seed=1).train()
    want = gradients(model, None)
    offload = ActivationOffload(model, least_bytes=0)
    recompute_activations(model, recomputed, offload)
    for _ in range(2):
        got = gradients(model, offload)
        assert offload.moved_bytes > 0
        assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.slow
def test_compiled_layers_that_are_recomputed_have_the_same_gradients(monkeypatch):
    model = new_model(build_tokenizer(), ARCH, seed=1).train()
    want = gradients(model, None)
    torch._dynamo.reset()
    compile_layers(model, "aot_eager")
    offload = Host(model)
    recompute_activations(model, True, offload)
    got = gradients(model, offload)
    assert len(offload.moved) >= 2 * LAYERS
    for name in want:
        torch.testing.assert_close(got[name], want[name], atol=1e-5, rtol=1e-5)


def kept_bytes(offloads: bool) -> tuple[int, int]:
    """What a forward pass leaves on the device for the backward pass, and what on the host."""
    model = new_model(build_tokenizer(), ARCH, seed=1).train()
    offload = Host(model) if offloads else None
    recompute_activations(model, True, offload)
    with LiveBytes() as live:
        for tensor in (*model.parameters(), *model.buffers()):
            live.count(tensor)
        before = live.now
        with offload.forward_pass() if offload else nullcontext():
            loss = trie_loss(model, TRIE)
        assert loss.requires_grad
        return live.now - before, offload.moved_bytes if offload else 0


def test_what_recomputed_layers_keep_is_on_the_host():
    plain, _ = kept_bytes(False)
    device, host = kept_bytes(True)
    layer = len(TRIE) * 2 * HIDDEN * 4  # its input, and the result of its attention
    assert plain > LAYERS * layer
    assert host > LAYERS * layer and device < layer / 2


def test_weights_and_their_copies_are_never_moved():
    model = new_model(build_tokenizer(), ARCH, seed=1).train()
    copies = WeightCopies(model, torch.bfloat16)
    offload = Host(model)
    copies.cast()
    with torch.autocast("cpu", torch.bfloat16), offload.forward_pass():
        trie_loss(model, TRIE).backward()
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    assert len(weights) > 10 * LAYERS
    assert offload.moved and not weights & {*offload.moved}


@pytest.mark.gpu
def test_on_a_gpu_recomputed_layers_keep_nothing_on_the_device_and_gradients_are_the_same():
    trie = Trie.from_paths([[1] * 8192], [[1.0] * 8192])
    found = {}
    for offloads in (False, True):
        model = new_model(build_tokenizer(), {**ARCH, "hidden_size": 256}, seed=1).train()
        torch.nn.Module.to(model, "cuda")
        offload = ActivationOffload(model) if offloads else None
        recompute_activations(model, True, offload)
        trie_loss(model, Trie.from_paths([[1, 2]], [[1.0] * 2])).backward()
        model.zero_grad(set_to_none=False)
        before = torch.cuda.memory_allocated()
        offloading = offload.forward_pass() if offload else nullcontext()
        with torch.autocast("cuda", torch.bfloat16), offloading:
            loss = trie_loss(model, trie)
        kept = torch.cuda.memory_allocated() - before
        loss.backward()
        gradients = [p.grad.cpu() for p in model.parameters() if p.grad is not None]
        found[offloads] = kept, loss.item(), gradients
        assert offload is None or offload.moved_bytes > LAYERS * 8192 * 256 * 2
    (plain, want_loss, want), (kept, loss, got) = found[False], found[True]
    assert plain - kept > LAYERS * 8192 * 256 * 2
    assert loss == pytest.approx(want_loss, rel=1e-6)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_what_is_small_or_no_activation_stays():
    model = new_model(build_tokenizer(), ARCH, seed=1)
    offload = ActivationOffload(model, least_bytes=400)
    weight = next(p for p in model.parameters() if p.dim() == 2)
    moved, stays = torch.rand(100, requires_grad=True).exp(), torch.rand(99).exp()
    with offload.forward_pass():
        for tensor in (weight, weight.t(), stays, torch.arange(1000)):
            assert offload.pack(tensor) is tensor and offload.unpack(tensor) is tensor
        packed = offload.pack(moved)
    assert offload.moved_bytes == 400
    assert torch.equal(offload.unpack(packed), moved)


def test_a_cpu_has_nowhere_to_move_activations_from(new_run, fails):
    line = fails(new_run()("--compute.activation_offload", "true"), 2)
    assert "compute.activation_offload" in line and "the device is cpu" in line


@pytest.mark.parametrize("command", ["sft", "rl"])
def test_a_run_is_the_same_bit_for_bit(new_run, new_rl_run, command, monkeypatch):
    make = new_run if command == "sft" else new_rl_run
    plain, offloaded = make(name="plain"), make(name="offloaded")
    assert plain() == 0
    moved = []

    class OfTheRun(ActivationOffload):
        def __init__(self, model):
            super().__init__(model, least_bytes=0)

        def to_host(self, tensor):
            moved.append(tensor.numel())
            return super().to_host(tensor)

    monkeypatch.setattr(trainer, "ActivationOffload", OfTheRun)
    monkeypatch.setattr(run, "check_offload", lambda compute, device: None)
    options = ("--compute.activation_offload", "true", "--compute.gradient_checkpointing", "true")
    assert offloaded(*options) == 0
    assert moved
    assert offloaded.weights() == plain.weights()
    assert offloaded.metrics() == plain.metrics()
