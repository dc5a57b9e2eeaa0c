"""What a run computes with: PyTorch's own settings, the model, and how its layers run."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from threadweaver import ranks
from threadweaver.device import DTYPES
from threadweaver.model import (
    add_tags,
    build_tokenizer,
    load_configs,
    load_model,
    load_tokenizer,
    model_without_weights,
    new_model,
    replace_parameters,
    to_device,
)
from threadweaver.train.config import ConfigError, RunConfig
from threadweaver.train.layers import layers_of
from threadweaver.train.offload import ActivationOffload
from threadweaver.train.run_dir import device_of
from threadweaver.train.sharded_checkpoint import has_shards, load_weights
from threadweaver.train.sharding import Passes, shard


def prepare_torch(config: RunConfig, state: dict[str, Any] | None) -> torch.device:
    """Sets threads, seed and determinism; returns the device.

    Args:
        state: of the checkpoint that the run continues from.
    """
    compute = config.compute
    device = device_of(compute)
    # The number of threads decides in which order sums are taken.
    threads = compute.threads or (state["threads"] if state else None)
    if threads:
        torch.set_num_threads(threads)
    # On the CPU only: without it a gradient that many rows add to is summed in any order.
    torch.use_deterministic_algorithms(device.type == "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue] (set by a property of the module)
    if device.type == "cuda" and ranks.size() > 1:
        ranks.take_gpu()
    torch.manual_seed(config.seed + ranks.rank())
    return device


def build_model(
    config: RunConfig, checkpoint: Path | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model to train, in compute.parameters on the CPU: of a checkpoint if given, else of the
    settings.

    Raises:
        ValueError: there is none, it is damaged, or it cannot be trained on tries.
    """
    dtype = DTYPES[config.compute.parameters]
    if checkpoint is not None and has_shards(checkpoint):
        model, tokenizer = _without_weights(checkpoint)
        replace_parameters(model, lambda p: torch.empty(p.shape, dtype=dtype))
        load_weights(checkpoint, model)
        return model, tokenizer
    path = checkpoint or config.model.path
    if path is None:
        tokenizer = build_tokenizer()
        model = new_model(tokenizer, config.model.arch or {}, config.seed)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        return model, tokenizer
    try:
        model, tokenizer = load_model(path)
    except ValueError as error:
        if checkpoint is None:
            raise ConfigError(f"model.path: {error}") from error
        raise ConfigError(
            f"{error}; delete the folder {checkpoint.name} to resume from the checkpoint before it"
        ) from error
    add_tags(tokenizer, model)
    # A matrix product may round by where its operands lie. Loaded weights lie as they do in the
    # file; copies lie as in a model that was never saved.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype, copy=True)
    return model, tokenizer


def _without_weights(checkpoint: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of a checkpoint whose weights are in shards."""
    config, generation_config = load_configs(checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    return model_without_weights(config, tokenizer, generation_config), tokenizer


def build_passes(
    config: RunConfig, checkpoint: Path | None, device: torch.device
) -> tuple[Passes, PreTrainedTokenizerBase]:
    """The model to train, on its device, and divided among the ranks if there are several; as
    `build_model`. All ranks call it; rank 0 alone reads weights, or draws them."""
    if ranks.size() == 1:
        model, tokenizer = build_model(config, checkpoint)
        to_device(model, device)
        return Passes(model), tokenizer
    in_shards = checkpoint is not None and has_shards(checkpoint)
    full: list[PreTrainedModel] = []

    def parts():
        if in_shards:
            assert checkpoint is not None
            model, tokenizer = _without_weights(checkpoint)
        else:
            model, tokenizer = build_model(config, checkpoint)
            full.append(model)
        return model.config, tokenizer, model.generation_config

    found = ranks.on_first(parts)
    passes = shard(next(iter(full), None), model_without_weights(*found), config.compute, device)
    if in_shards:
        assert checkpoint is not None
        load_weights(checkpoint, passes.model)
    return passes, found[1]


def compile_layers(model: PreTrainedModel, backend: str = "inductor") -> None:
    """From now on the model's layers run through torch.compile, all of them and tries of every size
    through one graph. To be called before `recompute_activations`.

    Raises:
        ConfigError: its layers are none that `transformers` knows by their class.
    """
    for layer in _layers(model, "compile"):
        layer.forward = torch.compile(layer.forward, dynamic=True, backend=backend)


def _layers(model: PreTrainedModel, setting: str) -> list[GradientCheckpointingLayer]:
    layers = layers_of(model)
    if not layers:
        raise ConfigError(
            f"compute.{setting}: the layers of {model.config.model_type} cannot be told; leave it "
            "out"
        )
    return layers


# What a layer that is recomputed keeps: attention's result is small beside what computes it.
_KEPT = torch.ops.tw_kernels.trie_attention.default


def recompute_activations(
    model: PreTrainedModel, layers: bool | int = True, offload: ActivationOffload | None = None
) -> None:
    """From now on these layers keep their input and the result of their attention alone, and
    compute the rest again in the backward pass.

    Unlike the model's own gradient_checkpointing_enable also in evaluation mode, in which P-GRPO
    runs it.

    Args:
        layers: True: all; False: none; a number: so many, from the first on. The backward pass has
            freed what the others keep when it comes to these.
        offload: where the results of attention go; None: they stay on the device.

    Raises:
        ConfigError: its layers are none that `transformers` knows how to run again, or fewer.
    """
    found = _layers(model, "gradient_checkpointing")
    count = len(found) if layers is True else int(layers)
    if count > len(found):
        raise ConfigError(
            f"compute.gradient_checkpointing is {count}: the model has {len(found)} layers; true "
            "stands for all"
        )
    keep = partial(create_selective_checkpoint_contexts, [_KEPT])
    if offload is not None:
        keep = partial(offload.keep, _KEPT)
    for layer in found[:count]:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, context_fn=keep)
