"""The probe of an architecture: what it refuses and why, and that it leaves a model as it was."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tests.model.families import large_weights, small_config, small_model
from threadweaver.model import (
    attention,
    build_tokenizer,
    check_supported,
    loss,
    new_model,
    output_layer,
    probe,
)
from threadweaver.model.probe import _random_parameters

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def small(family, **fields):
    config = small_config(family, **fields)
    return AutoModelForCausalLM.from_config(config, attn_implementation="trie")


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
@pytest.mark.parametrize("refused", [False, True])
def test_a_probe_leaves_the_model_as_it_was(family, refused):
    model = small_model(family)
    torch.nn.Module.to(model, torch.bfloat16)
    model.train()
    model.model.layers[1].eval()
    model.model.norm.weight.requires_grad_(False)
    model.model.embed_tokens.weight.grad = torch.ones_like(model.model.embed_tokens.weight)
    if refused:
        model.model.layers[1].input_layernorm.register_forward_hook(_mix_tokens)
    parameters = {name: (p, p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())
    fields = model.config.to_json_string()
    windows = [getattr(module, "sliding_window", None) for module in model.modules()]
    training = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    if refused:
        with pytest.raises(ValueError, match="differ from the model's own"):
            probe(model)
    else:
        probe(model)
    assert dict(model.named_parameters()).keys() == parameters.keys()
    for name, parameter in model.named_parameters():
        before, values, requires_grad = parameters[name]
        assert parameter is before and parameter.requires_grad == requires_grad, name
        assert torch.equal(parameter, values), name
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())
    assert model.model.embed_tokens.weight.grad.eq(1).all()
    assert model.config.to_json_string() == fields
    assert model.config._attn_implementation == "trie"
    assert [getattr(module, "sliding_window", None) for module in model.modules()] == windows
    assert [module.training for module in model.modules()] == training
    assert torch.equal(torch.get_rng_state(), random)


def _mix_tokens(module, inputs, output):
    """What no config tells of: tokens reach those that follow them in the row, path or not."""
    return output + 0.05 * output.cumsum(1)


def test_a_layer_that_mixes_tokens_besides_attention_is_refused():
    model = small_model("llama")
    probe(model)
    model.model.layers[2].input_layernorm.register_forward_hook(_mix_tokens)
    with pytest.raises(ValueError, match=r"llama models are not supported: over a trie log-prob"):
        probe(model)


def test_logits_that_are_scaled_otherwise_are_refused():
    model = small_model("llama")
    model.register_forward_hook(_scale_logits)
    with pytest.raises(ValueError, match="log-probabilities differ from the model's own by"):
        probe(model)


def _scale_logits(module, inputs, output):
    output.logits = output.logits * 1.02
    return output


def test_a_fresh_model_is_refused_though_its_weights_hide_the_mistake():
    # The parameter with which Doge makes its mask starts at 0.
    fields = {"num_experts": 4, **TINY}
    with pytest.raises(ValueError, match=r"^model\.arch: doge models are not supported: "):
        new_model(build_tokenizer(), {"model_type": "doge", **fields})


@pytest.mark.parametrize(
    ("family", "argument"),
    [("mistral", "sliding_window"), ("gemma2", "softcap"), ("gpt_oss", "s_aux")],
)
def test_attention_without_a_window_soft_cap_or_sinks_is_found_out(family, argument, monkeypatch):
    model = small_model(family)
    probe(model)
    monkeypatch.delitem(attention._VARIANT, argument)
    with pytest.raises(ValueError, match="log-probabilities differ from the model's own by"):
        probe(model)


@pytest.mark.parametrize(
    ("family", "left_out"),
    [("granite", "scale"), ("cohere", "scale"), ("hyperclovax", "scale"), ("gemma2", "softcap")],
)
def test_logits_without_a_scale_or_soft_cap_are_found_out(family, left_out, monkeypatch):
    fields = {"logits_scaling": 3.0} if family in ("granite", "hyperclovax") else {}
    model = small(family, **fields)
    probe(model)
    plain = {"scale": 1.0, "softcap": None}
    without = replace(output_layer(model), **{left_out: plain[left_out]})
    monkeypatch.setattr(loss, "output_layer", lambda model: without)
    with pytest.raises(ValueError, match="over a trie log-probabilities differ"):
        probe(model)


REFUSED = {
    "a window that attention is not told of": (
        "qwen2_moe",
        {"use_sliding_window": True, "sliding_window": 7, "layer_types": ["sliding_attention"] * 3},
        "over a trie log-probabilities differ",
    ),
    "bidirectional": ("gemma3_text", {"use_bidirectional_attention": True}, "follows a token"),
    "decoder without causal mask": ("bert", {}, "sees what follows a token"),
    "arguments are lost": ("stablelm", {}, "do not hand the arguments of a call down"),
    "arguments are lost, too": ("nemotron", {}, "do not hand the arguments of a call down"),
    "two calls a layer": ("diffllama", {}, "attention ran 6 times, and not once in each"),
    "a mask of its own": ("doge", {}, "makes a mask of its own"),
    "multi-head latent attention": ("deepseek_v3", {}, "keys and values of different sizes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_more_than_attention_to_a_path_is_refused_by_name(case):
    family, fields, reason = REFUSED[case]
    with pytest.raises(ValueError, match=rf"^{family} models are not supported: .*{reason}") as e:
        probe(small(family, **fields))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("model_type", "fields", "reason"),
    [
        ("bloom", {}, "do not take an attention function"),
        ("falcon", {}, "do not take an attention function"),
        ("gptj", {}, "do not take an attention function"),
        ("mpt", {}, "do not take an attention function"),
        ("xglm", {}, "do not take an attention function"),
        ("rwkv", {}, "do not take an attention function"),
        ("mamba", {}, "recurrent layers"),
        ("bart", {}, "have an encoder"),
        ("t5", {}, "have an encoder"),
        ("vit", {}, "no causal language model of this type"),
        ("llama4_text", {}, "layers of type 'chunked_attention'"),
        ("lfm2", {"layer_types": ["conv"] * 32}, "layers of type 'conv'"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
            "rotary embedding of type 'dynamic' .* longest sequence of a batch",
        ),
        (
            "phi3",
            {
                "rope_scaling": {
                    "type": "longrope",
                    "short_factor": [1.0] * 48,
                    "long_factor": [2.0] * 48,
                }
            },
            "rotary embedding of type 'longrope'",
        ),
    ],
)
def test_what_cannot_be_right_is_refused_before_anything_is_built(model_type, fields, reason):
    config = AutoConfig.for_model(model_type, **fields)
    with pytest.raises(ValueError, match=rf"^{model_type} models are not supported: .*{reason}"):
        check_supported(config)


def test_all_layers_share_the_values_of_a_probe():
    model = small_model("qwen3_moe")
    with _random_parameters(model):
        layers = [dict(layer.named_parameters()) for layer in model.model.layers]
        for name, parameter in layers[0].items():
            assert parameter is layers[1][name] is layers[2][name]
            assert parameter.dtype == torch.float32
        weights = layers[0]
        assert not torch.equal(
            weights["self_attn.k_proj.weight"], weights["self_attn.v_proj.weight"]
        )


def test_large_weights_leave_no_part_without_effect():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    large_weights(model)
    assert all(parameter.abs().min() > 0 for parameter in model.parameters())
