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
from transformers import Qwen3Config
from transformers.models.qwen3 import modeling_qwen3

pytest.importorskip("triton")

from tests.model.families import small_model
from threadweaver.model import fuse, probe, to_device, trie_loss
from threadweaver.model import fused as model_fused
from threadweaver.model.deferred_norms import deferrable_norms
from threadweaver.model.fused import _Fused, _FusedAttention, _FusedLayer, _FusedMLP, _FusedNorm
from threadweaver.model.lora import Adapters, adapter_parameters
from threadweaver.model.recognition import mlp_of, norm_of
from threadweaver.train.setup import recompute_activations
from tw_kernels import Trie, fused

ROTARY = "apply_rotary_pos_emb"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REASON = fused.why_not(torch.device(DEVICE))
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

PATHS = [[5, 8, 13, 21], [5, 8, 40, 41], [7, 9]]
# Of three layers: norms, MLPs, layers whose residual is added in the norm, attentions whose norms
# are applied by the rotation, and the rotation.
PARTS = {
    "llama": (7, 3, 3, 0, True),
    "qwen3": (13, 3, 3, 3, True),
    "qwen3_moe": (13, 0, 3, 3, True),
    "gemma2": (13, 0, 0, 0, True),  # GELU, and norms of what is added
    "gemma3_text": (19, 0, 0, 3, True),  # as Gemma 2, and norms of transposed heads
    "olmo2": (13, 3, 0, 0, True),  # norms of what is added, and of all heads at once
    "exaone4": (13, 3, 0, 2, True),  # a layer without a rotation
    "granite": (7, 3, 0, 0, True),  # scaled residuals
    "phi3": (7, 0, 0, 0, True),  # gate and up in one product
    "gpt_oss": (7, 0, 0, 0, False),  # angles of half a head
    "gpt_neox": (0, 0, 0, 0, True),
}


@pytest.fixture(autouse=True)
def rotations_as_they_were(monkeypatch):
    """A fused rotation serves a family for the life of the process; a test gives it back."""
    install, undo = model_fused._install, []

    def recorded(model):
        replaced = install(model)
        undo.extend(entry for entry in replaced if entry[1] == ROTARY)
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
    kinds = (_FusedNorm, _FusedMLP, _FusedLayer, _FusedAttention)
    counts = [sum(isinstance(m, kind) for m in model.modules()) for kind in kinds]
    rotary = getattr(sys.modules[type(model).__module__], ROTARY, None)
    return (*counts, hasattr(rotary, "unfused"))


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


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("gemma2", "qwen3_moe", "exaone4")]


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", *SLOW])
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


def fused_qwen3(monkeypatch):
    """Of one layer, and not run to see whether it computes what it did."""
    model = model_of("qwen3")
    del model.base_model.layers[1:]
    monkeypatch.setattr(model_fused, "trie_outputs", lambda model: torch.zeros(1))
    assert fuse(model) is None and parts(model) == (5, 1, 1, 1, True)
    return model


def test_norms_and_rotation_of_queries_and_keys_are_one_launch_and_their_gradient_one(monkeypatch):
    from tw_kernels.fused import rms_norm, rotary, swiglu

    model, launched = fused_qwen3(monkeypatch), []

    def launch(kernel, *arguments, **constants):
        launched.append(kernel.fn.__name__)

    for module in (rms_norm, rotary, swiglu):
        monkeypatch.setattr(module, "launch", launch)
    model.requires_grad_()
    loss_and_gradients(model)
    of_layer = ["_forward_kernel", "_rotate_kernel", *["_forward_kernel"] * 2]  # norms, SwiGLU
    backward = ["_backward_kernel"] * 2 + ["_gradient_kernel", "_backward_kernel"]
    assert launched == [*of_layer, "_forward_kernel", "_backward_kernel", *backward]


def test_a_fused_model_is_recomputed_with_the_same_gradients(monkeypatch):
    model = fused_qwen3(monkeypatch)
    want, wanted = loss_and_gradients(model)
    recompute_activations(model)
    got, grads = loss_and_gradients(model)
    assert torch.equal(got, want) and grads.keys() == wanted.keys()
    assert all(torch.equal(grads[name], wanted[name]) for name in grads)


def test_a_fused_model_in_a_process_that_fused_no_rotation_computes_its_norms(monkeypatch):
    """As one that was pickled."""
    model = fused_qwen3(monkeypatch)
    want = loss_and_gradients(model)[0]
    source = sys.modules[type(model).__module__]
    setattr(source, ROTARY, vars(getattr(source, ROTARY))["unfused"])
    torch.testing.assert_close(loss_and_gradients(model)[0], want, rtol=1e-5, atol=0)


def test_a_model_with_adapters_is_fused(monkeypatch):
    pytest.importorskip("peft")
    models = []
    for _ in range(2):
        model = model_of("qwen3")
        del model.base_model.layers[1:]
        Adapters(model, 2, 4.0, ["q_proj", "k_proj"], [5], seed=0)
        with torch.no_grad():
            for parameter in adapter_parameters(model):
                parameter.copy_(torch.linspace(-0.3, 0.3, parameter.numel()).view_as(parameter))
        models.append(model)
    adapted = models[1]
    monkeypatch.setattr(model_fused, "trie_outputs", lambda model: torch.zeros(1))
    assert fuse(adapted) is None and parts(adapted) == (5, 1, 1, 1, True)
    (want, wanted), (got, grads) = (loss_and_gradients(model) for model in models)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    assert grads.keys() == wanted.keys() and len(grads) == 4 + 2
    for name, gradient in grads.items():
        assert (gradient - wanted[name]).norm() <= 1e-4 * wanted[name].norm(), name


apply_rotary_pos_emb = model_fused._fused_rotary(modeling_qwen3.apply_rotary_pos_emb)


class PlantedAttention(nn.Module):
    """Nearly one that leaves its norms to its rotation."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.config = kind, Qwen3Config()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(16, n, bias=False) for n in (32, 16, 16))
        self.q_norm, self.k_norm = nn.RMSNorm(16), nn.RMSNorm(16)

    def forward(self, hidden_states, position_embeddings, attention_mask):
        q, k, v = (
            project(hidden_states).unflatten(-1, (-1, 16)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = self.q_norm(q), k if self.kind == "queries alone" else self.k_norm(k)
        gate, (cos, sin) = 1.0, position_embeddings
        if self.kind == "used elsewhere" or (self.kind == "in training" and self.training):
            gate = q.mean()
        elif self.kind == "scaled":
            q = 2 * q
        elif self.kind == "values":
            v = self.k_norm(v)
        elif self.kind == "values of keys":
            v = k
        elif self.kind == "other angles":
            cos = 2 * cos
        elif self.kind == "twice":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.kind != "unrotated":
            q, k = apply_rotary_pos_emb(q, k, cos, sin)
        scores = q @ k.repeat_interleave(2, 1).mT
        return gate * (scores.softmax(-1) @ v.repeat_interleave(2, 1)), scores


@pytest.mark.parametrize(
    "kind, want",
    [
        ("as it should be", ("q_norm", "k_norm")),
        ("queries alone", ("q_norm", None)),
        ("used elsewhere", (None, "k_norm")),
        ("in training", (None, "k_norm")),
        ("scaled", (None, "k_norm")),
        ("values", ("q_norm", None)),
        ("values of keys", ("q_norm", None)),
        ("other angles", None),
        ("twice", None),
        ("unrotated", None),
    ],
)
def test_norms_are_left_to_the_rotation_that_they_go_to_and_to_no_other(kind, want):
    assert deferrable_norms(PlantedAttention(kind), {"q_norm": 16, "k_norm": 16}) == want


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "gemma2", "gemma3_text", "olmo2", "granite", "exaone4"]
)
def test_a_fused_model_passes_the_probe_over_tries_and_pages(family):
    model = model_of(family)
    assert fuse(model) is None
    probe(model)


def test_a_copy_of_a_fused_model_is_fused(monkeypatch):
    model = fused_qwen3(monkeypatch)
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    assert parts(twin) == parts(model)
    norm, copied = model.base_model.norm, twin.base_model.norm
    x = torch.randn(2, 64, device=DEVICE)
    assert copied is not norm and copied.weight is norm.weight and torch.equal(copied(x), norm(x))


def test_a_fused_model_can_be_pickled(monkeypatch):
    model = fused_qwen3(monkeypatch)
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
    assert parts(model) == (0, 0, 0, 0, False)
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
    model = model_of("qwen3")
    assert fuse(model) is None
    ids = torch.tensor([[5, 8, 13], [7, 9, 11]], device=DEVICE)
    model.set_attn_implementation("eager")
    got, want = model(ids).logits, model_of("qwen3", "eager")(ids).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    x, norm = torch.randn(3, 64, device=DEVICE), model.base_model.norm
    compiled = torch.compile(norm, backend="eager", fullgraph=True)
    want = norm.weight * F.rms_norm(x, (64,), eps=norm.fused_eps)
    torch.testing.assert_close(compiled(x), want)
