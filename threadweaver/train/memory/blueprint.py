"""The model of a run as it will be, of tensors that have shapes, dtypes and no memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
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
from threadweaver.train.config import ConfigError, ModelConfig
from threadweaver.train.memory.gpu import as_on_gpu
from threadweaver.train.memory.live import LiveBytes


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
    """

    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase | None


def architecture_of(settings: ModelConfig) -> Architecture:
    """Of a new model, or of one on disk, whose weights need not be there.

    Raises:
        ConfigError: there is none, or one that cannot be trained on tries.
    """
    try:
        if settings.path is None:
            tokenizer = build_tokenizer()
            with reading("model.arch"):
                config = config_of(tokenizer, settings.arch or {})
                check_supported(config)
            return Architecture(config, tokenizer)
        config, _ = load_configs(settings.path)
        with reading(settings.path):
            check_supported(config)
    except ValueError as error:
        field = "" if str(error).startswith("model.arch") else "model.path: "
        raise ConfigError(f"{field}{error}") from error
    try:
        tokenizer = load_tokenizer(settings.path)
    except ValueError:
        return Architecture(config, None)  # a plan may come before the download
    text = config.get_text_config()
    add_tags(tokenizer)
    text.vocab_size = table_rows(text.vocab_size, tokenizer)
    return Architecture(config, tokenizer)


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
    if architecture.tokenizer is not None:
        mask_unknown_ids(model, architecture.tokenizer)  # by the values of real tensors
    with as_on_gpu(model) if on_gpu else nullcontext(), mode, LiveBytes() as live:
        for tensor in (*model.parameters(), *model.buffers()):
            live.count(tensor)
        yield Blueprint(live, model)
