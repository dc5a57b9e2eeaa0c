"""The layers of a loaded decoder on the kernels of `tw_kernels.fused`.

A module is recognised by what it computes, not by the name of its family: its own forward runs on
a few numbers, and is replaced where the result is that of

    a norm      x / sqrt(mean(x^2) + eps) * (weight + 0 or 1)
    an MLP      down(silu(gate(x)) * up(x))
    a layer     h = x + attention(norm(x)); h + mlp(norm(h)): the sum and the second norm are one
    a rotation  of both halves of queries and keys, by the function that its attention calls

Whatever else a model has stays as it is. Parameters, their names and the config do too, so a fused
model saves, loads and trains like any other. The kernels run on a GPU. Elsewhere, on a batch of
sequences and under torch.compile, which fuses by itself, each module computes as it did.

Under autocast a norm and a rotation return autocast's dtype: what takes them is a matrix product
or attention, which would cast them to it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from functools import cache
from itertools import permutations
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from threadweaver.model.probe import TOLERANCE, trie_outputs
from tw_kernels import fused

_ROTARY = "apply_rotary_pos_emb"  # what attention modules of transformers call
_MOST_COLUMNS = 16384  # of a norm


def fuse(model: PreTrainedModel) -> str | None:
    """Makes a model's layers run on fused kernels where it is now.

    It must compute what it computed before: log-probabilities of the load-time probe's trie, with
    its random parameters in float32. Else it is left as it was.

    Returns:
        Why it is not fused, in a clause; None if it is.
    """
    if reason := fused.why_not(model.device):
        return reason
    before = trie_outputs(model)
    undo = _install(model)
    try:
        worst = (trie_outputs(model) - before).abs().max().item()
        reason = f"log-probabilities would differ by {worst:.2g} nats"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        worst, reason = torch.inf, " ".join(str(error).split())[:200]
    if worst <= TOLERANCE:
        return None
    for holder, name, value in reversed(undo):
        setattr(holder, name, value)
    return reason


def to_device(model: PreTrainedModel, device: torch.device) -> None:
    """Moves a model; on a GPU its layers run on fused kernels, or a line on stderr says why not."""
    nn.Module.to(model, device)
    if device.type == "cuda" and (reason := fuse(model)):
        _warn(f"{model.config.model_type}: layers run unfused: {reason}")


@cache
def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)


def _install(model: PreTrainedModel) -> list[tuple[Any, str, Any]]:
    """Replaces what it can; returns what to set back, as (object, attribute, value)."""
    undo: list[tuple[Any, str, Any]] = []

    def become(module: nn.Module, kind: type, **attributes: Any) -> None:
        vars(module).update(attributes)
        undo.append((module, "__class__", type(module)))
        module.__class__ = _with(kind, type(module))

    modules = [m for m in model.modules() if not isinstance(m, _Fused)]
    for module in modules:
        if found := _norm_of(module):
            become(module, _FusedNorm, fused_eps=found[0], fused_offset=found[1])
        elif names := _mlp_of(module):
            become(module, _FusedMLP, fused_names=names)
    for module in modules:
        if _is_layer(module):
            become(module, _FusedLayer)
    for source in {type(m).__module__: sys.modules[type(m).__module__] for m in modules}.values():
        function = getattr(source, _ROTARY, None)
        if function is not None and not hasattr(function, "unfused") and _is_rotation(function):
            undo.append((source, _ROTARY, function))
            setattr(source, _ROTARY, _fused_rotary(function))
    return undo


@cache
def _with(kind: type, original: type) -> type:
    """The original class with the forward of a fused one before its own."""
    return type(f"Fused{original.__name__}", (kind, original), {})


def _runs_fused(x: Tensor) -> bool:
    return not torch.compiler.is_compiling() and fused.runs_on(x)


def _out_dtype(x: Tensor, other: Tensor) -> torch.dtype:
    """Autocast's, or that of a product of both."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(x.dtype, other.dtype)


class _Fused(nn.Module):
    """What a module becomes, beside its own class: `super().forward` is that class's."""

    def __reduce__(self):
        """For pickle, which does not find a class that was made at run time."""
        return _of_class, type(self).__bases__, vars(self)


def _of_class(kind: type, original: type) -> nn.Module:
    """A module without attributes, to be filled by pickle or copy."""
    fused_class: Any = _with(kind, original)
    return fused_class.__new__(fused_class)


class _FusedNorm(_Fused):
    fused_eps: float
    fused_offset: float
    weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if not _runs_fused(x):
            return super().forward(x)
        from tw_kernels.fused.rms_norm import rms_norm

        dtype = _out_dtype(x, self.weight)
        return rms_norm(x, self.weight, self.fused_eps, self.fused_offset, dtype)

    def of_sum(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """x + delta, and its norm."""
        from tw_kernels.fused.rms_norm import add_rms_norm

        dtype = _out_dtype(x, self.weight)
        return add_rms_norm(x, delta, self.weight, self.fused_eps, self.fused_offset, dtype)


class _FusedMLP(_Fused):
    fused_names: tuple[str, str, str]  # gate, up, down

    def forward(self, x: Tensor) -> Tensor:
        if not _runs_fused(x):
            return super().forward(x)
        from tw_kernels.fused.swiglu import swiglu

        gate, up, down = (getattr(self, name) for name in self.fused_names)
        return down(swiglu(gate(x), up(x)))


class _FusedLayer(_Fused):
    input_layernorm: nn.Module
    self_attn: nn.Module
    post_attention_layernorm: _FusedNorm
    mlp: nn.Module

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        if not _runs_fused(hidden_states):
            return super().forward(hidden_states, **kwargs)
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states, normed = self.post_attention_layernorm.of_sum(hidden_states, attended)
        return hidden_states + self.mlp(normed)


def _fused_rotary(original: Callable) -> Callable:
    """For all models of the family: it differs on a GPU alone."""

    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any):
        """q [1, Hq, N, D], k [1, Hkv, N, D], cos and sin [1, N, D]; else as the original."""
        packed = q.dim() == 4 and q.shape[0] == cos.shape[0] == 1 and cos.shape[-1] == q.shape[-1]
        if args or kwargs or not packed or not _runs_fused(q):
            return original(q, k, cos, sin, *args, **kwargs)
        from tw_kernels.fused.rotary import rotary

        q, k = (x.squeeze(0).transpose(0, 1) for x in (q, k))
        q, k = rotary(q, k, cos.squeeze(0), sin.squeeze(0), _out_dtype(q, cos))
        return q.transpose(0, 1).unsqueeze(0), k.transpose(0, 1).unsqueeze(0)

    vars(rotary)["unfused"] = original
    return rotary


def _numbers(*shape: int) -> Tensor:
    """Random, the same every time, and without a move of the generators that a run draws from."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _equal(got: Any, want: Tensor) -> bool:
    same_kind = isinstance(got, Tensor) and got.shape == want.shape
    return same_kind and torch.allclose(got.double(), want.double(), rtol=1e-5, atol=1e-7)


def _computed(compute: Callable[[], Any]) -> Any:
    """What it returns; None if the module needs what a plain call does not have."""
    try:
        with torch.no_grad():
            return compute()
    except Exception:
        return None


def _norm_of(module: nn.Module) -> tuple[float, float] | None:
    """eps and offset of an RMS norm; None if it is none."""
    weight = getattr(module, "weight", None)
    own = [*module.parameters(), *module.buffers(), *module.children()]
    if not isinstance(weight, Tensor) or weight.dim() != 1 or len(own) != 1:
        return None
    size = len(weight)
    if not 1 < size <= _MOST_COLUMNS or len(inspect.signature(module.forward).parameters) != 1:
        return None
    # So small that any eps shows.
    x, w = 1e-3 * _numbers(3, size), 1 + _numbers(1, size)[0] / 4
    got = _computed(lambda: functional_call(module, {"weight": w}, (x,)))
    for eps in {value for value in vars(module).values() if isinstance(value, float)}:
        for offset in (0.0, 1.0):
            if _equal(got, x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * (offset + w)):
                return eps, offset
    return None


def _mlp_of(module: nn.Module) -> tuple[str, str, str] | None:
    """Names of gate, up and down; None if it is no SwiGLU."""
    linear = {name: child for name, child in module.named_children() if type(child) is nn.Linear}
    # Without `training`: what asks for it fails. One mode would not show what the other computes.
    others = {n: value for n, value in _public(module) if n not in linear and n != "training"}
    if len(linear) != 3 or any(isinstance(child, nn.Dropout) for child in module.children()):
        return None
    x = _numbers(3, 8)
    stubs = dict(zip(linear, _stub_functions(), strict=False))
    got = _computed(lambda: cast(Any, type(module)).forward(SimpleNamespace(**others, **stubs), x))
    for gate, up, down in permutations(linear):
        if linear[gate].weight.shape != linear[up].weight.shape:
            continue
        if _equal(got, stubs[down](F.silu(stubs[gate](x)) * stubs[up](x))):
            return gate, up, down
    return None


def _public(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Attributes and children."""
    yield from ((n, v) for n, v in vars(module).items() if not n.startswith("_"))
    yield from module.named_children()


def _stub_functions() -> list[Callable[[Tensor], Tensor]]:
    """Stand-ins for children, which no order of them but one gives the same result."""
    return [lambda x, c=c: torch.sin(c * x) + c for c in (0.7, 1.1, 1.3, 1.7)]


def _is_layer(module: nn.Module) -> bool:
    names = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
    children = dict(module.named_children())
    if children.keys() != set(names) or not isinstance(children[names[2]], _FusedNorm):
        return False
    first, attend, second, mlp = _stub_functions()
    passed = {"attention_mask": None, "position_ids": object(), "trie_layout": object()}
    received = []

    def attention(hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        received.append(kwargs)
        return attend(hidden_states), None

    stub = SimpleNamespace(**dict(zip(names, (first, attention, second, mlp), strict=True)))
    x = _numbers(3, 8)
    got = _computed(lambda: cast(Any, type(module)).forward(stub, x, **passed))
    hidden = x + attend(first(x))
    given = received and {name: received[0].get(name) for name in passed} == passed
    return bool(given) and _equal(got, hidden + mlp(second(hidden)))


def _is_rotation(function: Callable) -> bool:
    q, k, cos, sin = (_numbers(1, heads, 3, 8) for heads in (4, 2, 1, 1))
    cos, sin = cos.squeeze(1), sin.squeeze(1).flip(-1)
    got = _computed(lambda: function(q, k, cos, sin))

    def rotated(x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, -1)
        return x * cos.unsqueeze(1) + torch.cat((-x2, x1), -1) * sin.unsqueeze(1)

    return (
        isinstance(got, tuple)
        and len(got) == 2
        and all(_equal(mine, rotated(x)) for mine, x in zip(got, (q, k), strict=True))
    )
