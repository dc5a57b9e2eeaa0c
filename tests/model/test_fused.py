"""Models on fused kernels, in Triton's interpreter: the same outputs and gradients, and what stays
as it is."""

import copy
import pickle
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("triton")

from tests.model.families import small_model
from threadweaver.model import fuse, probe, to_device, trie_loss
from threadweaver.model import fused as model_fused
from threadweaver.model.fused import _Fused, _FusedLayer, _FusedMLP, _FusedNorm
from threadweaver.model.recognition import mlp_of, norm_of
from tw_kernels import Trie, fused

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REASON = fused.why_not(torch.device(DEVICE))
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

PATHS = [[5, 8, 13, 21], [5, 8, 40, 41], [7, 9]]
# Of three layers: norms, MLPs, layers whose residual is added in the norm, and the rotation.
PARTS = {
    "llama": (7, 3, 3, True),
    "qwen3": (13, 3, 3, True),
    "qwen3_moe": (13, 0, 3, True),
    "gemma2": (13, 0, 0, True),  # GELU, and norms of what is added
    "olmo2": (13, 3, 0, True),  # norms of what is added
    "granite": (7, 3, 0, True),  # scaled residuals
    "phi3": (7, 0, 0, True),  # gate and up in one product
    "gpt_oss": (7, 0, 0, False),  # angles of half a head
    "gpt_neox": (0, 0, 0, True),
}


@pytest.fixture(autouse=True)
def rotations_as_they_were(monkeypatch):
    """A fused rotation serves a family for the life of the process; a test gives it back."""
    install, undo = model_fused._install, []

    def recorded(model):
        replaced = install(model)
        undo.extend(entry for entry in replaced if entry[1] == "apply_rotary_pos_emb")
        return replaced

    monkeypatch.setattr(model_fused, "_install", recorded)
    yield
    for entry in undo:
        setattr(*entry)


def model_of(family, attention="trie") -> Any:
    model = small_model(family, attention)
    nn.Module.to(model, DEVICE)
    return model


def parts(model):
    counts = [sum(isinstance(m, k) for m in model.modules()) for k in (_FusedNorm, _FusedMLP)]
    layers = sum(isinstance(m, _FusedLayer) for m in model.modules())
    rotary = getattr(sys.modules[type(model).__module__], "apply_rotary_pos_emb", None)
    return (*counts, layers, hasattr(rotary, "unfused"))


def loss_and_gradients(model):
    model.zero_grad()
    loss = trie_loss(model, Trie.from_paths(PATHS, [[1.0] * len(path) for path in PATHS]))
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", PARTS)
def test_what_is_fused_is_recognised_by_what_it_computes(family, monkeypatch):
    model = model_of(family)
    monkeypatch.setattr(model_fused, "trie_outputs", lambda model: torch.zeros(1))
    assert fuse(model) is None
    assert parts(model) == PARTS[family]
    assert fuse(model) is None  # again, as of a model that was moved
    assert parts(model) == PARTS[family]


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_a_fused_model_has_the_same_loss_and_gradients(family):
    model = model_of(family)
    want, wanted = loss_and_gradients(model)
    names = list(model.state_dict())
    assert fuse(model) is None and parts(model) == PARTS[family]
    got, grads = loss_and_gradients(model)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    assert list(model.state_dict()) == names and grads.keys() == wanted.keys()
    for name, gradient in grads.items():
        assert (gradient - wanted[name]).norm() <= 1e-4 * wanted[name].norm(), name


def test_a_fused_model_under_autocast_casts_no_activation_for_its_products():
    """A norm and a rotation return what the next product takes; the residual stays in float32."""
    model = model_of("qwen3")
    want, wanted = loss_and_gradients(model)
    assert fuse(model) is None
    inputs = []
    for module in model.base_model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].dtype))
    residual = []
    model.base_model.layers[0].register_forward_hook(lambda *a: residual.append(a[-1].dtype))
    with torch.autocast(DEVICE, torch.bfloat16):
        got, grads = loss_and_gradients(model)
    assert set(inputs) == {torch.bfloat16} and residual == [torch.float32]
    torch.testing.assert_close(got, want, rtol=1e-2, atol=0)
    for name, gradient in grads.items():
        assert (gradient - wanted[name]).norm() <= 0.1 * wanted[name].norm(), name


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "olmo2", "granite"])
def test_a_fused_model_passes_the_probe_over_tries_and_pages(family):
    model = model_of(family)
    assert fuse(model) is None
    probe(model)


def test_a_copy_of_a_fused_model_is_fused(monkeypatch):
    model = model_of("llama")
    monkeypatch.setattr(model_fused, "trie_outputs", lambda model: torch.zeros(1))
    assert fuse(model) is None
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    assert parts(twin) == parts(model)
    norm, copied = model.base_model.norm, twin.base_model.norm
    x = torch.randn(2, 64, device=DEVICE)
    assert copied is not norm and copied.weight is norm.weight and torch.equal(copied(x), norm(x))


def test_a_fused_model_can_be_pickled(monkeypatch):
    model = model_of("llama")
    monkeypatch.setattr(model_fused, "trie_outputs", lambda model: torch.zeros(1))
    assert fuse(model) is None
    twin = pickle.loads(pickle.dumps(model))
    assert parts(twin) == parts(model)
    assert list(twin.state_dict()) == list(model.state_dict())
    assert torch.equal(loss_and_gradients(twin)[0], loss_and_gradients(model)[0])


class DropoutMLP(nn.Module):
    """An MLP that drops what it returns, in training mode alone."""

    def __init__(self, of_functions):
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.p = 0.5
        if not of_functions:
            self.dropout = nn.Dropout(self.p)

    def forward(self, x):
        x = self.down(F.silu(self.gate(x)) * self.up(x))
        if hasattr(self, "dropout"):
            return self.dropout(x)
        return F.dropout(x, self.p, self.training)


@pytest.mark.parametrize("of_functions", [False, True])
def test_an_mlp_with_a_dropout_stays_as_it_is(of_functions):
    assert mlp_of(DropoutMLP(of_functions).eval()) is None


def test_a_model_that_would_compute_something_else_is_left_as_it_was(monkeypatch):
    model = model_of("llama")
    classes = [type(module) for module in model.modules()]
    want = loss_and_gradients(model)[0]
    monkeypatch.setattr(model_fused, "norm_of", wrong_eps(norm_of))
    assert "would differ by" in (fuse(model) or "")
    assert [type(module) for module in model.modules()] == classes
    assert parts(model) == (0, 0, 0, False)
    assert torch.equal(loss_and_gradients(model)[0], want)


def wrong_eps(norm_of):
    def planted(module):
        return found and (10 * found[0] + 0.1, found[1]) if (found := norm_of(module)) else None

    return planted


class Planted(nn.Module):
    """Nearly a norm."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.eps, self.weight = kind, 1e-6, nn.Parameter(torch.ones(16))

    def forward(self, x):
        mean = x.mean(-1, keepdim=True) if self.kind == "centred" else 0
        x = (x - mean) * ((x - mean).square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return x * (2 + self.weight) if self.kind == "offset of two" else x * self.weight**2


@pytest.mark.parametrize("kind", ["centred", "offset of two", "squared"])
def test_what_is_nearly_a_norm_is_none(kind):
    assert norm_of(Planted(kind)) is None
    assert norm_of(nn.LayerNorm(16)) is None


def test_on_a_cpu_a_model_stays_as_it_is():
    model = small_model("llama")
    to_device(model, torch.device("cpu"))
    assert not any(isinstance(module, _Fused) for module in model.modules())


def test_a_batch_of_sequences_and_a_compiled_model_run_unfused():
    model = model_of("llama")
    assert fuse(model) is None
    ids = torch.tensor([[5, 8, 13], [7, 9, 11]], device=DEVICE)
    model.set_attn_implementation("eager")
    got, want = model(ids).logits, model_of("llama", "eager")(ids).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    x, norm = torch.randn(3, 64, device=DEVICE), model.base_model.norm
    compiled = torch.compile(norm, backend="eager", fullgraph=True)
    want = norm.weight * F.rms_norm(x, (64,), eps=norm.fused_eps)
    torch.testing.assert_close(compiled(x), want)
