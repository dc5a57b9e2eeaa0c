"""Randomly initialised decoders, from the fields of a Hugging Face config."""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from threadweaver.model.attention import ATTENTION
from threadweaver.model.files import reading
from threadweaver.model.logits import mask_unknown_ids
from threadweaver.model.probe import probe
from threadweaver.model.sizes import check_heads, check_sizes
from threadweaver.model.supported import check_supported
from threadweaver.model.vocabulary import table_rows

# Where a config class has one of these, its default is that of a model of billions of parameters.
_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "moe_intermediate_size",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
)
# Fields that transformers reads where a config has them, though few of its classes declare them.
_UNDECLARED = {
    "full_attention_interval",
    "head_dim",
    "partial_rotary_factor",
    "rope_local_base_freq",
    "rope_scaling",
    "rope_theta",
    "rotary_emb_base",
    "rotary_pct",
    "sliding_window_pattern",
}


def new_model(
    tokenizer: PreTrainedTokenizerBase, arch: dict[str, Any], seed: int = 0
) -> PreTrainedModel:
    """A randomly initialised decoder for this tokenizer.

    Args:
        arch: `model_type` and fields of that Hugging Face config, all sizes among them.

    Raises:
        ValueError: an unknown model type or field, a size that is missing or out of range, or a
            model with layers a trie cannot use.
    """
    with reading("model.arch"):
        config = config_of(tokenizer, arch)
        check_supported(config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(
                config, attn_implementation=ATTENTION, trust_remote_code=False
            )
        mask_unknown_ids(model, tokenizer)
        probe(model)
        return model


def parameter_count(model: torch.nn.Module) -> str:
    """How many parameters a model has, in words: "1.5 M parameters"."""
    count = sum(parameter.numel() for parameter in model.parameters())
    for unit, name in ((10**9, " B"), (10**6, " M"), (10**3, " K")):
        if count >= unit:
            return f"{count / unit:.1f}{name} parameters"
    return f"{count} parameters"


def config_of(tokenizer: PreTrainedTokenizerBase, arch: dict[str, Any]) -> PretrainedConfig:
    """Of a new model; arguments and errors as those of `new_model`."""
    given = dict(arch)
    kind = given.pop("model_type", None)
    if kind is None:
        raise ValueError("model_type is missing: name the architecture, such as qwen3 or llama")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        near = difflib.get_close_matches(str(kind), list(CONFIG_MAPPING), n=1)
        hint = f": did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"model_type {kind!r} is unknown to transformers{hint}")
    of_tokenizer = {
        "vocab_size": table_rows(0, tokenizer),
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    _check_fields(CONFIG_MAPPING[kind], kind, given, set(of_tokenizer))
    check_sizes(arch)
    config = CONFIG_MAPPING[kind](**of_tokenizer, **given)
    check_heads(config)
    return config


def _check_fields(
    kind: type[PretrainedConfig], name: str, given: dict[str, Any], of_tokenizer: set[str]
) -> None:
    """Raises ValueError if a field is unknown or belongs to the tokenizer, or a size is missing."""
    known = {field.name: field.default for field in fields(kind)}
    aliases = kind.attribute_map

    def declared(field: str) -> str:
        return aliases[field] if aliases.get(field) in known else field

    for field in given:
        if aliases.get(field, field) in of_tokenizer:
            raise ValueError(f"{field} is that of the tokenizer: leave it out")
        if field not in known.keys() | aliases.keys() | _UNDECLARED:
            near = difflib.get_close_matches(str(field), [*known, *aliases], n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"{name} has no such field"
            raise ValueError(f"unknown field {field!r}: {hint}")
    if not {declared(size) for size in _SIZES[:2]} <= known.keys():
        text = kind.sub_configs.get("text_config")
        hint = f", such as {text.model_type}" if text is not None and text.model_type else ""
        raise ValueError(f"{name} is not one decoder alone: name the type of a text model{hint}")
    sizes = dict.fromkeys(map(declared, _SIZES))
    set_here = set(map(declared, given))
    missing = [s for s in sizes if isinstance(known.get(s), int) and s not in set_here]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} must be set: the defaults of {name} are those of a large model"
        )
