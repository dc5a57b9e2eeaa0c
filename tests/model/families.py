"""A small random model of every family of causal language models that `transformers` has."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

FAMILIES = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY = 96
LAYERS = 3
WINDOW = 7
# By what a field is called; the first that fits. Fields that a config lacks are left out.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "n_embd": 64,
    "d_model": 64,
    "n_embed": 64,
    "dim": 64,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "encoder_ffn_dim": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "n_layer": LAYERS,
    "n_layers": LAYERS,
    "num_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_layers": 1,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "n_positions": 512,
    "max_seq_len": 512,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": WINDOW,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "index_topk": 8,
    "n_group": 1,
    "topk_group": 1,
}
ZERO = (
    "attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "hidden_dropout",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "activation_dropout",
    "attn_dropout", "embedding_dropout", "classifier_dropout", "layerdrop", "decoder_layerdrop",
)  # fmt: skip
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
# Fields that must fit together, or that no common name makes small.
SPECIAL: dict[str, dict[str, Any]] = {
    "dots1": {"v_head_dim": None},
    "fuyu": {"text_config": {"model_type": "persimmon"}},
    "gemma4_text": {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "lfm2_moe": {"layer_types": ["full_attention"] * LAYERS},
    "roc_bert": {
        "pronunciation_embed_dim": 8,
        "pronunciation_vocab_size": 8,
        "shape_embed_dim": 8,
        "shape_vocab_size": 8,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def small_config(family: str, **fields: Any) -> PretrainedConfig:
    """A config of the family with sizes of a few dozen, and no dropout; with short windows in some
    layers where it has windows."""
    kind = CONFIG_MAPPING[family]
    return kind(**_small(kind(), SPECIAL.get(family, {}) | fields))


def _small(config: PretrainedConfig, fields: dict[str, Any]) -> dict[str, Any]:
    names = config.to_dict().keys() | config.attribute_map.keys()
    sizes = {name: size for name, size in SIZES.items() if name in names}
    if "sliding_window" in names and "layer_types" in names:
        sizes["layer_types"] = LAYER_TYPES
    if "use_sliding_window" in names:
        sizes["use_sliding_window"] = True
    sizes |= {name: 0.0 for name in ZERO if getattr(config, name, None)}
    sizes |= {name: 0 for name in TOKENS if name in names}
    for key in config.sub_configs:
        if isinstance(part := getattr(config, key, None), PretrainedConfig):
            special = SPECIAL.get(part.model_type, {})
            sizes[key] = {"model_type": part.model_type} | _small(part, special)
    return sizes | fields


def large_weights(model: nn.Module, seed: int = 0) -> None:
    """Draws all parameters so that no part of a layer is without effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.rand(parameter.shape, generator=generator) * 2 - 1
            if parameter.dim() < 2:
                parameter.copy_(1 + noise / 2)
            else:
                parameter.copy_(noise * 2 * parameter.shape[-1] ** -0.5)
