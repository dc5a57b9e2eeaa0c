"""Norms of queries and keys that an attention leaves to its rotation, which is one kernel then.

The attention's own forward runs, with no norms, and in the place of cos it hands the rotation
NormedAngles. Whether it computes the same that way is found out on a few numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn

from threadweaver.model.recognition import computed, equal, numbers

Pair = tuple[str | None, str | None]  # names of the norms of queries and of keys


@dataclass(frozen=True)
class NormedAngles:
    """cos, and the norms that queries and keys must pass before they are rotated."""

    cos: Tensor
    q_norm: Callable[[Tensor], Tensor] | None
    k_norm: Callable[[Tensor], Tensor] | None


def with_children(module: nn.Module, children: dict[str, Any], **attributes: Any) -> Any:
    """A module that has these children and attributes, and shares all others with `module`."""
    view = object.__new__(type(module))
    vars(view).update(vars(module), _modules=module._modules | children, **attributes)
    return view


def deferrable_norms(module: nn.Module, sizes: dict[str, int]) -> Pair | None:
    """The norms that an attention may leave to its rotation, which must take NormedAngles.

    Args:
        sizes: of its norms, by their names.
    """
    for pair in permutations([*sizes, None], 2):
        if len({sizes[name] for name in pair if name is not None}) != 1:
            continue
        want = computed(lambda p=pair: _attended(module, sizes, p, deferred=False))
        got = computed(lambda p=pair: _attended(module, sizes, p, deferred=True))
        if want is not None and equal(got, want):
            return pair
    return None


def _attended(module: Any, sizes: dict[str, int], pair: Pair, deferred: bool) -> Tensor:
    """What an attention computes with stand-ins for its children, in both modes.

    Two sequences: kernels take one, so this is the family's own rotation.
    """
    config = copy.copy(module.config)  # first: what has none is no attention
    (size,) = {sizes[name] for name in pair if name is not None}
    x, cos = numbers(2, 3, 8), numbers(2, 3, size)
    norms: dict[Any, Any] = {
        name: partial(_norm, 1 + numbers(i + 1, n)[i] / 4)
        for i, (name, n) in enumerate(sizes.items())
    }
    children: dict[str, Any] = {
        name: partial(_linear, i + 1, child.out_features)
        for i, (name, child) in enumerate(module.named_children())
        if isinstance(getattr(child, "out_features", None), int)  # adapters around one have it too
    }
    angles: Any = cos
    children |= norms
    if deferred:
        children |= {name: nn.Identity() for name in pair if name is not None}
        angles = NormedAngles(cos, norms.get(pair[0]), norms.get(pair[1]))
    config._attn_implementation_internal = "eager"
    results = []
    for training in (False, True):
        view = with_children(module, children, config=config, training=training)
        embeddings = (angles, cos.flip(-1))
        arguments = {"position_embeddings": embeddings, "attention_mask": None}
        results.append(type(module).forward(view, hidden_states=x, **arguments)[0])
    return torch.stack(results)


def _norm(weight: Tensor, x: Tensor) -> Tensor:
    if x.shape[-1] != len(weight):
        raise ValueError("a norm of something else")
    return x * x.square().mean(-1, keepdim=True).rsqrt() * weight


def _linear(seed: int, size: int, x: Tensor) -> Tensor:
    """[..., size]; all of x has a part in all of it, and none the same."""
    mixed = x @ torch.cos(seed * torch.arange(1.0, x.shape[-1] + 1))
    return torch.sin(mixed[..., None] + seed * torch.arange(1.0, size + 1))
