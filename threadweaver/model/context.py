"""How many tokens a model can have before it."""

from __future__ import annotations

from typing import cast

from torch import nn
from transformers import PreTrainedModel


def context_length(model: PreTrainedModel) -> int | None:
    """Most tokens of a path, prompt included; None: the config names no limit.

    It is max_position_embeddings, or what a table of learned positions holds if that is less.
    """
    limits = [getattr(model.config.get_text_config(), "max_position_embeddings", None)]
    tokens = model.get_input_embeddings()
    for name, module in model.base_model.named_modules():
        leaf = name.rpartition(".")[2]
        if not isinstance(module, nn.Embedding) or module is tokens:
            continue
        if leaf == "wpe" or "position" in leaf:
            # OPT and others keep rows before that of position 0.
            offset = cast(int, getattr(module, "offset", 0))
            limits.append(module.num_embeddings - offset)
    return min((limit for limit in limits if limit and limit > 0), default=None)
