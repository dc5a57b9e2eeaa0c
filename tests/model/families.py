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
}
ZERO = (
    "attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "hidden_dropout",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "activation_dropout",
    "attn_dropout", "embedding_dropout", "classifier_dropout", "layerdrop", "decoder_layerdrop",
)  # fmt: skip
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
SPECIAL: dict[str, dict[str, Any]] = {}


def small_config(family: str, **fields: Any) -> PretrainedConfig:
    """A config of the family with sizes of a few dozen, and no dropout."""
    kind = CONFIG_MAPPING[family]
    default = kind()
    text = default.get_text_config()
    sizes = {name: size for name, size in SIZES.items() if _has(text, name)}
    if getattr(text, "sliding_window", None) is None:
        sizes.pop("sliding_window", None)
    sizes |= {name: 0.0 for name in ZERO if getattr(text, name, None)}
    sizes |= {name: None for name in TOKENS if _has(text, name)}
    sizes |= SPECIAL.get(family, {}) | fields
    if text is default:
        return kind(**sizes)
    key = next(k for k in kind.sub_configs if getattr(default, k) is text)
    return kind(**{key: sizes})


def _has(config: PretrainedConfig, name: str) -> bool:
    return name in config.to_dict() or name in getattr(config, "attribute_map", {})


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
