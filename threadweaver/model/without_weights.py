"""A model whose parameters have no values: what is filled with them otherwise than from a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from threadweaver.model.attention import ATTENTION
from threadweaver.model.logits import mask_unknown_ids


def model_without_weights(
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    generation_config: GenerationConfig | None,
) -> PreTrainedModel:
    """A decoder set to attend over tries, its parameters in float32 on the meta device, its buffers
    on the CPU; config and tokenizer as those of a model that `load_model` or `new_model` made."""
    with _parameters_on_meta():
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation=ATTENTION, dtype=torch.float32, trust_remote_code=False
        )
    model.generation_config = generation_config
    mask_unknown_ids(model, tokenizer)
    return model


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made inside have parameters without memory, and buffers as ever."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # one that is tied stays so
            parameter = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def replace_parameters(model: nn.Module, make: Callable[[Tensor], Tensor]) -> None:
    """Puts another tensor in the place of each parameter; what is tied stays tied."""
    made: dict[int, nn.Parameter] = {}
    old = []  # kept, so that no address is used again
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                value = make(parameter.detach())
                made[id(parameter)] = nn.Parameter(value, parameter.requires_grad)
                old.append(parameter)
            module._parameters[name] = made[id(parameter)]
