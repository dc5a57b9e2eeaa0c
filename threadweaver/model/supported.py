"""Configs of models that cannot be right over a trie, refused before any weight is read.

What a config does not tell, the probe finds out (probe.py).
"""

from __future__ import annotations

import sys
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

_LAYERS = {"full_attention", "sliding_attention"}
# Their angles depend on the longest sequence of a batch, so a token's on more than its path.
_BATCH_ROTARY = {"dynamic", "longrope"}


def check_supported(config: PretrainedConfig) -> None:
    """Raises ValueError, with the family's name and the reason, if a trie cannot be right for it:
    a token must depend on its path alone, and attention must be the one way that tokens mix."""
    if reason := _why_not(config):
        raise ValueError(f"{config.model_type} models are not supported: {reason}")
    # By its other names (GPT-2: attn_pdrop) attention itself refuses it, in training alone.
    if getattr(config.get_text_config(), "attention_dropout", 0):
        raise ValueError(
            f"{config.model_type}: config.attention_dropout must be 0 for attention over a trie"
        )


def _why_not(config: PretrainedConfig) -> str | None:
    text = config.get_text_config()
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if config.is_encoder_decoder:
        return "they have an encoder"
    if kind is None:
        return "transformers has no causal language model of this type"
    own = any(name.endswith("_ATTENTION_CLASSES") for name in vars(sys.modules[kind.__module__]))
    if own or not kind._can_set_attn_implementation():
        return "their layers do not take an attention function"
    if kind._is_stateful:
        return "they have recurrent layers, whose state is not attention to a path"
    for layer in getattr(text, "layer_types", None) or []:
        if layer not in _LAYERS:
            return f"layers of type {layer!r} do more than attend to a path or to its last tokens"
    for rotary in _rotary_types(getattr(text, "rope_parameters", None)):
        if rotary in _BATCH_ROTARY:
            return (
                f"rotary embedding of type {rotary!r} turns by angles that depend on the longest "
                "sequence of a batch"
            )
    return None


def _rotary_types(parameters: Any) -> list[Any]:
    """Of all layers: parameters are those of a model, or by layer type."""
    if not isinstance(parameters, dict):
        return []
    own = parameters.get("rope_type", parameters.get("type"))
    return [own, *(t for value in parameters.values() for t in _rotary_types(value))]
