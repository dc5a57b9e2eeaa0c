"""A model of many equal layers, from runs of its first ones.

What a pass holds when it comes to a layer grows from layer to layer by the same amount. So runs of
two layers and of three tell what all of them hold, in a small part of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from threadweaver.train.layers import layers_of

# A dataclass of numbers, each of which grows by the same amount from layer to layer.
N = TypeVar("N", bound=Any)
_FEWEST = 2


def of_all_layers(model: PreTrainedModel, is_uniform: bool, run: Callable[[], N]) -> N:
    """What `run` would find of the whole model.

    Args:
        is_uniform: whether equal layers run alike.
        run: runs the layers that the model has then.
    """
    layers = _equal_layers(model)
    if layers is None or not is_uniform or len(layers) <= _FEWEST + 1:
        return run()
    with _first(layers, _FEWEST):
        fewest = run()
    with _first(layers, _FEWEST + 1):
        one_more = run()
    pairs = zip(astuple(fewest), astuple(one_more), strict=True)
    return type(fewest)(*(a + (len(layers) - _FEWEST) * (b - a) for a, b in pairs))


@contextmanager
def _first(layers: nn.ModuleList, count: int) -> Iterator[None]:
    """Inside, a list has its first layers alone."""
    modules = layers._modules
    layers._modules = dict(list(modules.items())[:count])
    try:
        yield
    finally:
        layers._modules = modules


def _equal_layers(model: PreTrainedModel) -> nn.ModuleList | None:
    """All decoder layers, if they are in one list and equal in class and shapes."""
    kinds = {_kind(layer) for layer in layers_of(model)}
    lists = [
        m
        for m in model.modules()
        if isinstance(m, nn.ModuleList) and len(m) and isinstance(m[0], GradientCheckpointingLayer)
    ]
    return lists[0] if len(kinds) == len(lists) == 1 else None


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    shapes = ((name, p.shape, p.dtype, p.requires_grad) for name, p in layer.named_parameters())
    return type(layer), *shapes
