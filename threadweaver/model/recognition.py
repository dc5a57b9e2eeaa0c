"""What a module of a decoder computes, found out by running its own forward on a few numbers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from itertools import permutations
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

_MOST_COLUMNS = 16384  # of a norm


def numbers(*shape: int) -> Tensor:
    """Random, the same every time, and without a move of the generators that a run draws from."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def equal(got: Any, want: Tensor) -> bool:
    same_kind = isinstance(got, Tensor) and got.shape == want.shape
    return same_kind and torch.allclose(got.double(), want.double(), rtol=1e-5, atol=1e-7)


def computed(compute: Callable[[], Any]) -> Any:
    """What it returns; None if the module needs what a plain call does not have."""
    try:
        with torch.no_grad():
            return compute()
    except Exception:
        return None


def norm_of(module: nn.Module) -> tuple[float, float] | None:
    """eps and offset of an RMS norm; None if it is none."""
    weight = getattr(module, "weight", None)
    own = [*module.parameters(), *module.buffers(), *module.children()]
    if not isinstance(weight, Tensor) or weight.dim() != 1 or len(own) != 1:
        return None
    size = len(weight)
    if not 1 < size <= _MOST_COLUMNS or len(inspect.signature(module.forward).parameters) != 1:
        return None
    # So small that any eps shows.
    x, w = 1e-3 * numbers(3, size), 1 + numbers(1, size)[0] / 4
    got = computed(lambda: functional_call(module, {"weight": w}, (x,)))
    for eps in {value for value in vars(module).values() if isinstance(value, float)}:
        for offset in (0.0, 1.0):
            if equal(got, x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * (offset + w)):
                return eps, offset
    return None


def mlp_of(module: nn.Module) -> tuple[str, str, str] | None:
    """Names of gate, up and down; None if it is no SwiGLU."""
    linear = {name: child for name, child in module.named_children() if type(child) is nn.Linear}
    # Without `training`: what asks for it fails. One mode would not show what the other computes.
    others = {n: value for n, value in _public(module) if n not in linear and n != "training"}
    if len(linear) != 3 or any(isinstance(child, nn.Dropout) for child in module.children()):
        return None
    x = numbers(3, 8)
    stubs = dict(zip(linear, _stub_functions(), strict=False))
    got = computed(lambda: cast(Any, type(module)).forward(SimpleNamespace(**others, **stubs), x))
    for gate, up, down in permutations(linear):
        if linear[gate].weight.shape != linear[up].weight.shape:
            continue
        if equal(got, stubs[down](F.silu(stubs[gate](x)) * stubs[up](x))):
            return gate, up, down
    return None


def _public(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Attributes and children."""
    yield from ((n, v) for n, v in vars(module).items() if not n.startswith("_"))
    yield from module.named_children()


def _stub_functions() -> list[Callable[[Tensor], Tensor]]:
    """Stand-ins for children, which no order of them but one gives the same result."""
    return [lambda x, c=c: torch.sin(c * x) + c for c in (0.7, 1.1, 1.3, 1.7)]


def is_layer(module: nn.Module) -> bool:
    names = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
    children = dict(module.named_children())
    if children.keys() != set(names):
        return False
    first, attend, second, mlp = _stub_functions()
    passed = {"attention_mask": None, "position_ids": object(), "trie_layout": object()}
    received = []

    def attention(hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        received.append(kwargs)
        return attend(hidden_states), None

    stub = SimpleNamespace(**dict(zip(names, (first, attention, second, mlp), strict=True)))
    x = numbers(3, 8)
    got = computed(lambda: cast(Any, type(module)).forward(stub, x, **passed))
    hidden = x + attend(first(x))
    given = received and {name: received[0].get(name) for name in passed} == passed
    return bool(given) and equal(got, hidden + mlp(second(hidden)))


def is_rotation(function: Callable) -> bool:
    q, k, cos, sin = (numbers(1, heads, 3, 8) for heads in (4, 2, 1, 1))
    cos, sin = cos.squeeze(1), sin.squeeze(1).flip(-1)
    got = computed(lambda: function(q, k, cos, sin))

    def rotated(x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, -1)
        return x * cos.unsqueeze(1) + torch.cat((-x2, x1), -1) * sin.unsqueeze(1)

    return (
        isinstance(got, tuple)
        and len(got) == 2
        and all(equal(mine, rotated(x)) for mine, x in zip(got, (q, k), strict=True))
    )
