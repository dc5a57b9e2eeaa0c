"""Weights cast once a step: how often, and what a step's gradients are."""

from collections import Counter

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from threadweaver.model import WeightCopies, build_tokenizer, new_model, trie_loss
from threadweaver.train.layers import layers_of
from threadweaver.train.setup import compile_layers, recompute_activations
from tw_kernels import Trie

ARCH = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attention_bias": True,
    "tie_word_embeddings": True,
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PATHS = [[5, 8, 13, 21, 34], [5, 8, 13, 40, 41, 42], [7, 9]]


class Casts(TorchDispatchMode):
    """How often each shape of matrix was cast into another dtype."""

    def __init__(self, parameters):
        super().__init__()
        self.matrices = {p.data_ptr(): tuple(p.shape) for p in parameters if p.dim() == 2}
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.matrices:
            self.counts[args[0].data_ptr()] += 1
        return function(*args, **(kwargs or {}))


def model_and_copies(dtype, recomputed=True):
    model = new_model(build_tokenizer(), ARCH, seed=1).train()
    nn.Module.to(model, DEVICE)
    copies = WeightCopies(model, dtype)
    recompute_activations(model, recomputed)
    return model, copies


def step(model, copies, passes=1):
    """Gradients of so many micro-batches."""
    model.zero_grad()
    copies.cast()
    for _ in range(passes):
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = trie_loss(model, Trie.from_paths(PATHS, [[1.0] * len(p) for p in PATHS]))
        loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_each_matrix_is_cast_once_a_step_however_many_passes_and_recomputed_layers():
    counts = {}
    for dtype in (None, torch.bfloat16):
        model, copies = model_and_copies(dtype)
        with Casts(model.parameters()) as casts:
            step(model, copies, passes=3)
        counts[dtype] = casts.counts
    # The output layer is the embedding.
    matrices = len([p for p in model.parameters() if p.dim() == 2])
    assert sorted(counts[torch.bfloat16].values()) == [1] * matrices
    # Autocast: in each pass, and in each recomputed layer.
    assert max(counts[None].values()) == 6


def test_the_gradients_are_those_of_autocast_in_float32():
    model, copies = model_and_copies(None)
    want = step(model, copies, passes=2)
    model, copies = model_and_copies(torch.bfloat16)
    got = step(model, copies, passes=2)
    assert got.keys() == want.keys()
    for name, gradient in got.items():
        assert gradient.dtype == torch.float32
        assert (gradient - want[name]).norm() <= 1e-2 * want[name].norm(), name


def test_compiled_layers_cast_their_weights_themselves():
    model, copies = model_and_copies(None, recomputed=False)
    want = step(model, copies)
    model = new_model(build_tokenizer(), ARCH, seed=1).train()
    nn.Module.to(model, DEVICE)
    copies = WeightCopies(model, torch.bfloat16, layers_of(model))
    compile_layers(model, "aot_eager")
    recompute_activations(model)
    got = step(model, copies)
    copied = [m for m in model.modules() if getattr(m, "cast_weight", None) is not None]
    assert copied == [model.get_output_embeddings()]
    for name, gradient in got.items():
        assert (gradient - want[name]).norm() <= 1e-2 * want[name].norm(), name


def test_copies_follow_the_weights_and_are_no_part_of_the_model():
    model, copies = model_and_copies(torch.bfloat16, recomputed=False)
    names = list(model.state_dict())
    before = step(model, copies)
    copies.free()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    assert list(model.state_dict()) == names
    after = step(model, copies)
    assert any(not torch.equal(before[name], after[name]) for name in names if name in before)
    fresh, plain = model_and_copies(None, recomputed=False)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.mul_(2)
    want = step(fresh, plain)
    for name, gradient in after.items():
        assert (gradient - want[name]).norm() <= 1e-2 * want[name].norm(), name


def test_without_copies_or_autocast_a_layer_multiplies_by_its_weight():
    layer = nn.Sequential(nn.Linear(8, 4)).to(DEVICE)
    x = torch.randn(3, 8, device=DEVICE)
    want = layer(x)
    copies = WeightCopies(layer, torch.bfloat16)
    assert torch.equal(layer(x), want)
    copies.cast()
    assert torch.equal(layer(x), want)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    copies.free()
    assert torch.equal(layer(x), want)


def test_on_a_cpu_no_copies_are_made():
    model = new_model(build_tokenizer(), ARCH)
    WeightCopies(model, None).cast()
    assert {type(m) for m in model.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
