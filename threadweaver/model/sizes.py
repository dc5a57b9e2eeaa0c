"""The sizes in a Hugging Face config: in range, before anything is built from them."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

# The largest value of each, beyond that of any real model: one of a damaged file is refused, and
# takes neither time nor memory.
_LARGEST = {
    "num_hidden_layers": 1000,
    **dict.fromkeys(
        (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "moe_intermediate_size",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
        ),
        10**7,
    ),
}


def check_sizes(fields: dict[str, Any]) -> None:
    """Raises ValueError, naming the field, unless the sizes of a decoder are in range.

    Args:
        fields: of a config, under their standard names or those of its `model_type`, which
            transformers knows. Values that are no whole numbers are left to its config class.
    """
    standard = {name: s for s, name in CONFIG_MAPPING[fields["model_type"]].attribute_map.items()}
    for name, value in fields.items():
        largest = _LARGEST.get(standard.get(name, name))
        if largest and isinstance(value, int) and not 1 <= value <= largest:
            raise ValueError(f"{name} is {value}: it must be from 1 to {largest:,}")


def check_heads(config: PretrainedConfig) -> None:
    """Raises ValueError unless every KV head has the same number of query heads."""
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    kv_heads = getattr(text, "num_key_value_heads", None)
    if isinstance(heads, int) and isinstance(kv_heads, int) and heads % kv_heads:
        raise ValueError(
            f"num_attention_heads is {heads}: it must be a multiple of num_key_value_heads, "
            f"{kv_heads}"
        )
