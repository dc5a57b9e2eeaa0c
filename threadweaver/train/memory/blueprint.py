"""The model of a run as it will be, of tensors that have shapes, dtypes and no memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from threadweaver.model import (
    ATTENTION,
    add_tags,
    build_tokenizer,
    check_supported,
    load_configs,
    load_tokenizer,
    mask_unknown_ids,
)
from threadweaver.model.files import reading
from threadweaver.model.new import config_of
from threadweaver.model.vocabulary import table_rows
from threadweaver.train.config import ConfigError, LoraConfig, ModelConfig
from threadweaver.train.lora import adapters_of, check_lora
from threadweaver.train.memory.gpu import as_on_gpu
from threadweaver.train.memory.live import LiveBytes
from threadweaver.trajectory import TAGS


@dataclass
class Blueprint:
    """A model to run inside `counting`.

    Attributes:
        live: what is counted.
        model: its parameters and buffers are counted too.
    """

    live: LiveBytes
    model: PreTrainedModel


@dataclass(frozen=True)
class Architecture:
    """What a model is built from.

    Attributes:
        config: with the rows that its tables will have.
        tokenizer: with the tags; None: there is none beside the config.
        lora: adapters that are trained in place of its weights.
    """

    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase | None
    lora: LoraConfig | None = None


def architecture_of(settings: ModelConfig) -> Architecture:
    """Of a new model, or of one on disk, whose weights need not be there.

    Raises:
        ConfigError: there is none, one that cannot be trained on tries, or none with such adapters.
    """
    check_lora(settings)
    try:
        if settings.path is None:
            tokenizer = build_tokenizer()
            with reading("model.arch"):
                config = config_of(tokenizer, settings.arch or {})
                check_supported(config)
            return Architecture(config, tokenizer, settings.lora)
        config, _ = load_configs(settings.path)
        with reading(settings.path):
            check_supported(config)
    except ValueError as error:
        field = "" if str(error).startswith("model.arch") else "model.path: "
        raise ConfigError(f"{field}{error}") from error
    try:
        tokenizer = load_tokenizer(settings.path)
    except ValueError:  # a plan may come before the download
        return Architecture(config, None, settings.lora)
    text = config.get_text_config()
    add_tags(tokenizer)
    text.vocab_size = table_rows(text.vocab_size, tokenizer)
    return Architecture(config, tokenizer, settings.lora)


@contextmanager
def counting(
    architecture: Architecture, parameters: torch.dtype, on_gpu: bool
) -> Iterator[Blueprint]:
    """Inside, tensors have no memory and are counted, those of the model in `parameters` first.

    Args:
        on_gpu: compute as on a GPU instead of a CPU.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        model = AutoModelForCausalLM.from_config(
            architecture.config, attn_implementation=ATTENTION, dtype=parameters
        )
        if architecture.lora is not None:
            _add_adapters(model, architecture.lora)
    if architecture.tokenizer is not None:
        mask_unknown_ids(model, architecture.tokenizer)  # by the values of real tensors
    with as_on_gpu(model) if on_gpu else nullcontext(), mode, LiveBytes() as live:
        for tensor in (*model.parameters(), *model.buffers()):
            live.count(tensor)
        yield Blueprint(live, model)


def _add_adapters(model: PreTrainedModel, settings: LoraConfig) -> None:
    """Those of the settings, and rows of as many tokens as there are tags."""
    # Modules of tensors without memory cannot be moved, and all of them are where they should be.
    with patch.object(nn.Module, "to", _stay):
        adapters_of(settings, model, range(len(TAGS)), 0)


def _stay(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """In the place of a move."""
    return module
