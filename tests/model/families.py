"""A small random model of every family of causal language models that `transformers` has, and the
table of docs/models.md: python -m tests.model.families writes it."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from threadweaver.model import ATTENTION, check_supported, probe

DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"
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
# Their layers tell attention nothing of windows, which are off in the models that there are.
MASK_ONLY = {"phimoe", "qwen2_moe"}
LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
# Fields that must fit together, or that no common name makes small.
SPECIAL: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}
            for kind in set(LAYER_TYPES)
        }
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}},
    "dots1": {"n_shared_experts": 1},
    "gemma3n_text": {
        "layer_types": [*LAYER_TYPES, *LAYER_TYPES],
        "num_hidden_layers": 6,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "intermediate_size": 96,
        "activation_sparsity_pattern": None,
    },
    "gemma4_text": {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"]
    },
    "longcat_flash": {"zero_expert_num": 2, "expert_ffn_hidden_size": 32, "ffn_hidden_size": 64},
    "roc_bert": {
        "pronunciation_embed_dim": 8,
        "pronunciation_vocab_size": 8,
        "shape_embed_dim": 8,
        "shape_vocab_size": 8,
    },
}
_REFUSED = "models are not supported: "
# What transformers cannot build here from sizes alone, and why.
UNBUILT = {
    "fuyu": "it has a config for one size alone",
    "gemma3n": "it needs the package timm",
    "gemma4_assistant": "it has no vocabulary of its own",
    "gemma4_unified_assistant": "it has no vocabulary of its own",
    "musicgen": "it has no config without those of its encoders",
    "musicgen_melody": "it has no config without those of its encoders",
}


def small_config(family: str, **fields: Any) -> PretrainedConfig:
    """A config of the family with sizes of a few dozen, and no dropout; with short windows in some
    layers where it has windows."""
    kind = CONFIG_MAPPING[family]
    # A copy: some configs change the lists that they are given.
    return kind(**copy.deepcopy(_small(kind(), SPECIAL.get(family, {}) | fields)))


def _small(config: PretrainedConfig, fields: dict[str, Any]) -> dict[str, Any]:
    names = config.to_dict().keys() | config.attribute_map.keys()
    sizes = {name: size for name, size in SIZES.items() if name in names}
    if config.model_type in MASK_ONLY:
        sizes["sliding_window"] = None
    elif "sliding_window" in names and "layer_types" in names:
        sizes["layer_types"] = LAYER_TYPES
    if "use_sliding_window" in names and config.model_type not in MASK_ONLY:
        sizes["use_sliding_window"] = True
    if "qk_rope_head_dim" in names and "head_dim" in names:
        sizes["head_dim"] = SIZES["qk_rope_head_dim"]
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


def small_model(family: str, attention: str = ATTENTION) -> PreTrainedModel:
    """With large random weights, the same for every attention."""
    model = AutoModelForCausalLM.from_config(small_config(family), attn_implementation=attention)
    large_weights(model)
    return model.eval()


def why_not(family: str) -> str | None:
    """Why the family is refused; None: it runs."""
    if family in UNBUILT:
        return UNBUILT[family]
    try:
        check_supported(CONFIG_MAPPING[family]())
    except ValueError as error:
        if reason := str(error).partition(_REFUSED)[2]:
            return reason
        assert "must be 0 for attention" in str(error)  # a dropout, which small_config turns off
    try:
        check_supported(small_config(family))
        probe(small_model(family))
    except ValueError as error:
        return str(error).partition(_REFUSED)[2]
    return None


def table_row(family: str, reason: str | None) -> str:
    return f"| `{family}` | {'runs' if reason is None else f'refused: {reason}'} |"


def table_rows() -> dict[str, str]:
    """Those of the document, by family."""
    rows = re.findall(r"^\| `([^`]+)` \| .*", DOCUMENT.read_text(), re.MULTILINE)
    lines = re.findall(r"^\| `[^`]+` \| .*", DOCUMENT.read_text(), re.MULTILINE)
    return dict(zip(rows, lines, strict=True))


def main() -> None:
    transformers.logging.set_verbosity_error()
    rows = [table_row(family, why_not(family)) for family in sorted(FAMILIES)]
    text, _, _ = DOCUMENT.read_text().partition("| Family |")
    DOCUMENT.write_text("\n".join([text + "| Family | |", "|---|---|", *rows, ""]))


if __name__ == "__main__":
    main()
