"""Adapters: what is trained, what peft and transformers make of the folders, and models without
them again."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

from tests.architecture import SMALL
from threadweaver.model import (
    WeightCopies,
    build_tokenizer,
    fuse,
    load_model,
    new_model,
    output_layer,
    save_model,
    token_logprobs,
    trie_hidden_states,
    trie_logprobs,
    trie_loss,
)
from threadweaver.model import loss as model_loss
from threadweaver.model.lora import (
    Adapters,
    adapted_layers,
    adapter_parameters,
    base_model,
    merged_model,
)
from threadweaver.train.setup import compile_layers, recompute_activations
from threadweaver.trajectory import TAGS
from tw_kernels import Trie, fused

pytest.importorskip("peft")
LLAMA = {**SMALL, "model_type": "llama"}
MODELS = {
    "qwen3, tied": {**SMALL, "tie_word_embeddings": True},
    "qwen3, untied": {**SMALL, "tie_word_embeddings": False},
    "llama, tied": {**LLAMA, "tie_word_embeddings": True},
    "llama, untied": {**LLAMA, "tie_word_embeddings": False},
    "gemma, whose embedding scales": {**SMALL, "model_type": "gemma", "num_key_value_heads": 2},
}
EXPERTS = {
    **SMALL,
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [0],
    "tie_word_embeddings": True,
}
MODELS["qwen3_moe, a layer without experts"] = EXPERTS
TOKENIZER = build_tokenizer()
TAG_IDS = [TOKENIZER.get_vocab()[tag] for tag in TAGS]
PATHS = [[7, 2, 70, 2, 3, 50, 8, 9], [7, 2, 70, 10, 2, 2, 51, 60, 11], [60, 5, 4]]


def model_with_adapters(arch: dict, targets: list[str] | str = "all-linear"):
    """All of whose adapters do something."""
    model = new_model(TOKENIZER, arch)
    adapters = Adapters(model, 4, 8.0, targets, TAG_IDS, seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model, adapters


def logits_of(model) -> torch.Tensor:
    """Of one sequence, as the trainer computes them."""
    trie = Trie.from_paths([torch.arange(100)])
    return output_layer(model)(trie_hidden_states(model, trie, trie.layout("cpu")))


def plain_logits(model, width: int) -> torch.Tensor:
    return model.eval()(torch.arange(100)[None]).logits[0, :, :width]


@pytest.mark.parametrize("arch", MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_adapters_load_in_plain_peft_and_merged_models_in_plain_transformers(arch, tmp_path):
    from peft import AutoPeftModelForCausalLM, PeftModel

    model, adapters = model_with_adapters(arch)
    own = logits_of(model)
    save_model(base_model(model), TOKENIZER, tmp_path / "base")
    save_model(merged_model(model), TOKENIZER, tmp_path / "merged")
    adapters.save(tmp_path / "adapters", str(tmp_path / "base"))
    TOKENIZER.save_pretrained(tmp_path / "adapters")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    untrained = plain_logits(base, own.shape[-1])
    assert (untrained - own).abs().max() > 0.1
    for loaded in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged"),
        PeftModel.from_pretrained(base, str(tmp_path / "adapters")),
        AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapters")),
    ):
        found = plain_logits(loaded, own.shape[-1])
        torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-5)
    with adapters.disabled():
        torch.testing.assert_close(logits_of(model), untrained, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits_of(model), own)
    again, _ = load_model(tmp_path / "merged")
    torch.testing.assert_close(logits_of(again), own, rtol=1e-5, atol=1e-5)


def test_only_adapters_and_rows_of_tags_have_gradients(tmp_path):
    for arch in list(MODELS.values())[:2]:
        model, adapters = model_with_adapters(arch)
        trie_loss(model, Trie.from_paths(PATHS, weights=[[1.0] * len(p) for p in PATHS])).backward()
        for name, parameter in model.named_parameters():
            is_adapter = "lora_" in name or name.endswith("trained_rows")
            assert (parameter.grad is not None) == parameter.requires_grad == is_adapter, name
            if parameter.grad is not None:
                assert parameter.dtype == torch.float32 and parameter.grad.any()
        layers = 2 * 7  # of two layers: four of attention, three of the MLP
        tables = 1 if arch["tie_word_embeddings"] else 2
        assert len(adapters.parameters()) == 2 * layers + tables


@pytest.fixture(params=["whole", "pieces", "kernels"])
def output(request, monkeypatch):
    """How the output layer runs: all at once, in pieces of 4 tokens, and so as on a GPU."""
    if request.param == "kernels":
        pytest.importorskip("triton")
        if reason := fused.why_not(torch.device("cpu")):
            pytest.skip(reason)
        monkeypatch.setattr(model_loss, "_by_kernels", lambda hidden: True)
    if request.param != "whole":
        monkeypatch.setitem(model_loss.LOGITS_AT_ONCE, "cpu", 4 * 128)


@pytest.mark.parametrize("arch", list(MODELS.values())[:2], ids=["tied", "untied"])
def test_trained_rows_have_the_gradient_of_these_rows_of_the_table(arch, output):
    """Of a table that holds them and is trained as a whole."""
    model, _ = model_with_adapters(arch)
    whole = merged_model(model).requires_grad_()
    for layer in [n for n, _ in model.named_parameters() if "lora_" in n]:
        model.get_parameter(layer).requires_grad_(False)
    trie = Trie.from_paths(PATHS, weights=[[1.0] * len(p) for p in PATHS])
    layout, at = trie.layout("cpu"), (trie.parents >= 0).nonzero()[:, 0]
    weights = torch.rand(2, len(at))

    def policy(model):
        found = trie_logprobs(model, trie, layout, at, entropy_gradient=True)
        return weights[0] @ found.logprobs + weights[1] @ found.entropies

    for loss in (lambda model: trie_loss(model, trie), policy):
        mine, want = loss(model), loss(whole)
        torch.testing.assert_close(mine, want, rtol=1e-5, atol=1e-4)
        mine.backward()
        want.backward()
        ids = torch.tensor(sorted(TAG_IDS))
        tables = {"embed": "get_input_embeddings"}
        if not arch["tie_word_embeddings"]:
            tables["output"] = "get_output_embeddings"
        for getter in tables.values():
            rows = getattr(model, getter)().trained_rows
            wanted = getattr(whole, getter)().weight.grad[ids]
            torch.testing.assert_close(rows.grad, wanted, rtol=1e-4, atol=1e-4)
        model.zero_grad()
        whole.zero_grad()


def test_hidden_states_have_the_gradient_that_passes_through_trained_rows(output):
    model, _ = model_with_adapters(MODELS["qwen3, untied"])
    hidden = torch.randn(6, 32, requires_grad=True)
    targets = torch.tensor([2, 3, 60, 4, 70, 13])
    heads = output_layer(model), output_layer(merged_model(model))
    grads = [
        torch.autograd.grad(token_logprobs(hidden, head, targets).logprobs.sum(), hidden)[0]
        for head in heads
    ]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def loss_and_gradients(model) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = trie_loss(model, Trie.from_paths(PATHS, weights=[[1.0] * len(p) for p in PATHS]))
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


COMPILED = pytest.param("compiled", marks=pytest.mark.slow)


@pytest.mark.parametrize("way", ["recomputed", COMPILED, "fused", "copies"])
def test_a_model_with_adapters_computes_the_same(way, monkeypatch):
    """With recomputed, compiled or fused layers, and with copies of its matrices."""
    model, _ = model_with_adapters(MODELS["qwen3, tied"])
    precision = torch.autocast("cpu", torch.bfloat16, enabled=way == "copies")
    with precision:
        want, wanted = loss_and_gradients(model)
    if way == "recomputed":
        recompute_activations(model)
    elif way == "compiled":
        compile_layers(model, backend="aot_eager")
        recompute_activations(model)
    elif way == "copies":
        WeightCopies(model, torch.bfloat16).cast()
    else:
        pytest.importorskip("triton")
        if reason := fused.why_not(torch.device("cpu")):
            pytest.skip(reason)
        monkeypatch.setattr(modeling_qwen3, "apply_rotary_pos_emb", apply_rotary_pos_emb)
        plain = new_model(TOKENIZER, MODELS["qwen3, tied"])
        assert fuse(plain) is None
        other = Adapters(plain, 4, 8.0, "all-linear", TAG_IDS, seed=0)
        with torch.no_grad():
            for mine, theirs in zip(other.parameters(), adapter_parameters(model), strict=True):
                mine.copy_(theirs)
        model = plain
        monkeypatch.setattr(model_loss, "_by_kernels", lambda hidden: True)
    with precision:
        got, grads = loss_and_gradients(model)
    tolerance = 1e-2 if way == "copies" else 1e-5  # of bfloat16, in which gradients are summed
    torch.testing.assert_close(got, want, rtol=tolerance, atol=0)
    assert grads.keys() == wanted.keys()
    for name, gradient in grads.items():
        assert (gradient - wanted[name]).norm() <= 10 * tolerance * wanted[name].norm(), name
    merged, _ = loss_and_gradients(merged_model(model).requires_grad_())
    torch.testing.assert_close(merged, want, rtol=tolerance, atol=0)


def test_the_same_seed_gives_the_same_adapters_and_moves_no_generator():
    state = torch.get_rng_state()
    first, second = (
        Adapters(new_model(TOKENIZER, SMALL), 2, 2.0, "q_proj", TAG_IDS, 3) for _ in "12"
    )
    assert torch.equal(torch.get_rng_state(), state)
    for mine, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_base_in_bfloat16_has_adapters_in_float32_and_is_not_copied_when_merged():
    model = new_model(TOKENIZER, MODELS["qwen3, untied"]).bfloat16()
    adapters = Adapters(model, 2, 2.0, ["v_proj"], TAG_IDS, seed=0)
    assert {p.dtype for p in adapters.parameters()} == {torch.float32}
    merged = dict(merged_model(model).named_parameters())
    assert {p.dtype for p in merged.values()} == {torch.bfloat16}
    own = {p.data_ptr() for p in model.parameters()}
    copied = {name for name, p in merged.items() if p.data_ptr() not in own}
    layers = {f"model.layers.{i}.self_attn.v_proj.weight" for i in range(2)}
    assert copied == layers | {"model.embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize(
    "targets, message",
    [
        (
            ["q_proj", "nothing"],
            "targets: 'nothing' names no linear layer .* there are: down_proj,",
        ),
        (["lm_head"], "targets: 'lm_head' names no linear layer"),
        (["embed_tokens"], "targets: 'embed_tokens' names no linear layer"),
        ("proj", "targets: 'proj' names no linear layer"),
    ],
)
def test_targets_that_match_nothing_are_refused(targets, message):
    model = new_model(TOKENIZER, MODELS["qwen3, untied"])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        Adapters(model, 4, 8.0, targets, TAG_IDS, seed=0)
    assert model.state_dict().keys() == before.keys()


def test_a_layer_that_peft_takes_for_experts_gets_no_adapter():
    model = new_model(TOKENIZER, EXPERTS)
    names = ["gate_proj", "up_proj", "down_proj"]
    with pytest.raises(ValueError, match="targets: 'down_proj' is what peft calls experts'"):
        Adapters(model, 4, 8.0, names, TAG_IDS, seed=0)
    Adapters(model, 4, 8.0, "all-linear", TAG_IDS, seed=0)
    adapted = {name.rpartition(".")[2] for name in adapted_layers(model)}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_adapters_of_another_model_or_a_damaged_file_are_refused(tmp_path: Path):
    _, adapters = model_with_adapters(SMALL)
    adapters.save(tmp_path, "base")
    _, other = model_with_adapters(SMALL, targets=["q_proj"])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors: made for another model"):
        other.load(tmp_path)
    _, fresh = model_with_adapters({**SMALL, "hidden_size": 64})
    with pytest.raises(ValueError, match="has shape"):
        fresh.load(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=re.escape("adapter_model.safetensors: ")):
        adapters.load(tmp_path)


def test_a_folder_of_adapters_is_no_model_and_says_where_one_is(tmp_path: Path):
    _, adapters = model_with_adapters(SMALL)
    adapters.save(tmp_path, "base")
    with pytest.raises(ValueError, match="holds adapters, no model; name the plain folder"):
        load_model(tmp_path)


def test_an_output_layer_with_a_bias_is_refused():
    arch = {**SMALL, "model_type": "phi", "num_key_value_heads": 2}
    arch.pop("head_dim")
    model = new_model(TOKENIZER, arch)
    with pytest.raises(ValueError, match="the output layer of phi has a bias"):
        Adapters(model, 4, 8.0, "all-linear", TAG_IDS, seed=0)
