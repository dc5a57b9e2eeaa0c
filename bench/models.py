"""Decoders of real shapes with random weights, made where they run: no download, and no copy of
their weights on the host. The shapes are those of Qwen3's models of these sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from bench.suite import UsageError
from threadweaver.model import ATTENTION, to_device

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {  # for tests
        "vocab_size": 2048,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": True,
    },
    "0.6B": {
        "vocab_size": 151_936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "1.7B": {
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "4B": {
        "vocab_size": 151_936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "8B": {
        "vocab_size": 151_936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
    "14B": {
        "vocab_size": 151_936,
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
    "32B": {
        "vocab_size": 151_936,
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
}


def check_names(names: Sequence[str]) -> None:
    """Raises UsageError if one of these names, the option --models, has no shape."""
    if unknown := [name for name in names if name not in SHAPES]:
        raise UsageError(f"--models: no shape {unknown[0]!r}; one of {', '.join(SHAPES)}")


def random_model(
    name: str, tokenizer: PreTrainedTokenizerBase, device: str, dtype: torch.dtype
) -> PreTrainedModel:
    """The model of a name in SHAPES, with this tokenizer's special ids."""
    config = AutoConfig.for_model(
        "qwen3",
        max_position_embeddings=40_960,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **SHAPES[name],
    )
    torch.manual_seed(0)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": ATTENTION}
    make: Any = AutoModelForCausalLM.from_config
    with torch.device(device):
        model: PreTrainedModel = make(config, **options)
    to_device(model, torch.device(device))  # fused, as a loaded model is
    return model


def product_weights(model: PreTrainedModel) -> int:
    """The number of weights that a token is multiplied by: all but an embedding that is only looked
    up."""
    embedding: Any = model.get_input_embeddings()
    output: Any = model.get_output_embeddings()
    looked_up = 0 if embedding.weight is output.weight else embedding.weight.numel()
    return sum(p.numel() for p in model.parameters()) - looked_up
