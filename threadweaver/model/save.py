"""Writes a model and its tokenizer as a plain Hugging Face folder."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: str | Path,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Writes a plain Hugging Face folder: safetensors, config and tokenizer.

    Args:
        weights: by name, in place of those in the model.

    Generation settings that `transformers` reads but refuses to write, such as a temperature
    without do_sample, are dropped from the model and logged.
    """
    _drop_what_is_refused(model)
    model.save_pretrained(directory, state_dict=weights)
    tokenizer.save_pretrained(directory)


def save_without_weights(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: str | Path
) -> None:
    """As `save_model`, without the safetensors."""
    _drop_what_is_refused(model)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _drop_what_is_refused(model: PreTrainedModel) -> None:
    if (config := model.generation_config) is not None:
        model.generation_config, dropped = writable(config)
        if dropped:
            logger.warning(
                "generation_config: %s not saved, since transformers refuses to write it",
                ", ".join(f"{name} {value!r}" for name, value in dropped.items()),
            )


def writable(config: GenerationConfig) -> tuple[GenerationConfig, dict[str, object]]:
    """The same settings without those that `transformers` refuses to write, and the latter.

    What it takes may depend on another setting (temperature on do_sample): settings are added to
    the default ones, again and again, as long as one more is taken.
    """
    if _is_valid(config):
        return config, {}
    kept = type(config)()
    refused = {k: v for k, v in vars(config).items() if vars(kept).get(k) != v}
    while True:
        num_refused = len(refused)
        for name, value in list(refused.items()):
            trial = copy.copy(kept)
            setattr(trial, name, value)
            if _is_valid(trial):
                kept = trial
                del refused[name]
        if len(refused) == num_refused:
            return kept, refused


def _is_valid(config: GenerationConfig) -> bool:
    try:
        config.validate(strict=True)
    except (ValueError, TypeError):
        return False
    return True
