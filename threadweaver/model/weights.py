"""The weights of a model on disk: all those of its config, and no others."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from threadweaver.model.attention import ATTENTION
from threadweaver.model.files import LOCAL, ModelSource, reading, stored_shapes, weight_files

# Parameters that cost nothing to build.
_SMALL = 2**26


def load_weights(
    source: ModelSource, config: PretrainedConfig, dtype: torch.dtype | Literal["auto"]
) -> PreTrainedModel:
    """A model that attends over tries, each of its weights as it was stored.

    Raises:
        ValueError: files are missing or damaged, or hold other weights than those of the config;
            names them.
    """
    if not source.gguf:
        files = weight_files(source.folder, getattr(config, "transformers_weights", None))
        stored = stored_shapes(files)
        _check_generation_config(source)
        if getattr(config, "quantization_config", None) is None:
            _check_sizes(source, config, stored)
    return _from_pretrained(source, dtype=dtype)


def _from_pretrained(source: ModelSource, **options: Any) -> PreTrainedModel:
    with reading(source.config):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.folder,
            attn_implementation=ATTENTION,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # refused below
            output_loading_info=True,
            **LOCAL,
            **source.gguf,
            **options,
        )
    model, found = loaded
    _check_found(source, model, found)
    return model


def _check_sizes(
    source: ModelSource, config: PretrainedConfig, stored: dict[str, list[int]]
) -> None:
    """Raises ValueError if a model of this config is far larger than its weights, before it takes
    any memory. What is not that far off, `_check_found` says more exactly."""
    with reading(source.config), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION)
    wanted = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    if sum(map(math.prod, wanted.values())) <= 2 * sum(map(math.prod, stored.values())) + _SMALL:
        return
    misfits = [
        (name, shape, wanted[name])
        for name, shape in stored.items()
        if wanted.get(name, shape) != shape
    ]
    missing = wanted.keys() - stored.keys()
    found = {"mismatched_keys": misfits, "missing_keys": missing}
    _check_found(source, model, {"unexpected_keys": [], "error_msgs": [], **found})


def _check_found(
    source: ModelSource, model: PreTrainedModel, found: Mapping[str, Collection[Any]]
) -> None:
    """Raises ValueError if weights would be random, or stored ones left out; names them."""
    for name, stored, expected in sorted(found["mismatched_keys"])[:1]:
        raise ValueError(
            f"{source.path}: {name} has shape {list(stored)} in the weights and "
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
            f"{source.path}: its weights are not those of its config.json: "
            f"{'; '.join(faults)}; use the config.json that they were saved with, and names that "
            "AutoModelForCausalLM gives them"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _check_generation_config(source: ModelSource) -> None:
    """Raises ValueError if there is one that cannot be read, or whose end tokens are no ids."""
    file = source.folder / "generation_config.json"
    if not file.exists():
        return
    with reading(file):
        ends = GenerationConfig.from_pretrained(source.folder, local_files_only=True).eos_token_id
        ids = ends if isinstance(ends, list) else [] if ends is None else [ends]
        if not all(isinstance(i, int) for i in ids):
            raise ValueError(f"eos_token_id is {ends!r}: it must be an id or a list of ids")
