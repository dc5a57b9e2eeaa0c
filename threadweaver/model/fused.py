"""The layers of a loaded decoder on the kernels of `tw_kernels.fused`.

A module is recognised by what it computes, not by the name of its family: its own forward runs on
a few numbers, and is replaced where the result is that of

    a norm      x / sqrt(mean(x^2) + eps) * (weight + 0 or 1)
    an MLP      down(silu(gate(x)) * up(x))
    a layer     h = x + attention(norm(x)); h + mlp(norm(h)): the sum and the second norm are one
    a rotation  of both halves of queries and keys, by the function that its attention calls
    attention   whose queries, keys or both go from a norm of each head to that function alone: norm
                and rotation are one

Whatever else a model has stays as it is. Parameters, their names and the config do too, so a fused
model saves, loads and trains like any other. The kernels run on a GPU. Elsewhere, on a batch of
sequences and under torch.compile, which fuses by itself, each module computes as it did.

Under autocast a norm and a rotation return autocast's dtype: what takes them is a matrix product
or attention, which would cast them to it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, reduce
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from threadweaver.model.deferred_norms import (
    NormedAngles,
    Pair,
    deferrable_norms,
    with_children,
)
from threadweaver.model.probe import TOLERANCE, trie_outputs
from threadweaver.model.recognition import is_layer, is_rotation, mlp_of, norm_of
from tw_kernels import fused

_ROTARY = "apply_rotary_pos_emb"  # what attention modules of transformers call


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
        if found := norm_of(module):
            become(module, _FusedNorm, fused_eps=found[0], fused_offset=found[1])
        elif names := mlp_of(module):
            become(module, _FusedMLP, fused_names=names)
    for module in modules:
        second = getattr(module, "post_attention_layernorm", None)
        if isinstance(second, _FusedNorm) and is_layer(module):
            become(module, _FusedLayer)
    for source in {type(m).__module__: sys.modules[type(m).__module__] for m in modules}.values():
        function = getattr(source, _ROTARY, None)
        if function is not None and not hasattr(function, "unfused") and is_rotation(function):
            undo.append((source, _ROTARY, function))
            setattr(source, _ROTARY, _fused_rotary(function))
    for module in modules:
        norms = {n: len(m.weight) for n, m in module.named_children() if isinstance(m, _FusedNorm)}
        if _has_fused_rotary(type(module)) and (pair := deferrable_norms(module, norms)):
            become(module, _FusedAttention, fused_norms=pair)
    return undo


@cache
def _with(kind: type, original: type) -> type:
    """The original class with the forward of a fused one before its own."""
    return type(f"Fused{original.__name__}", (kind, original), {})


def _has_fused_rotary(kind: type) -> bool:
    """Whether the rotation that an attention calls is fused: not so after pickle took the attention
    to another process."""
    original = kind.__bases__[1] if issubclass(kind, _Fused) else kind
    return hasattr(getattr(sys.modules[original.__module__], _ROTARY, None), "unfused")


def _runs_fused(x: Tensor) -> bool:
    return not torch.compiler.is_compiling() and fused.runs_on(x)


def _out_dtype(x: Tensor, *others: Tensor) -> torch.dtype:
    """Autocast's, or that of a product of all."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return reduce(torch.promote_types, [other.dtype for other in others], x.dtype)


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


class _FusedAttention(_Fused):
    fused_norms: Pair

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        angles: Any = kwargs.get("position_embeddings")
        if angles is None or not _runs_fused(angles[0]) or not _has_fused_rotary(type(self)):
            return super().forward(*args, **kwargs)
        norms = [name if name is None else getattr(self, name) for name in self.fused_norms]
        kwargs["position_embeddings"] = NormedAngles(angles[0], *norms), angles[1]
        identities = {name: _IDENTITY for name in self.fused_norms if name is not None}
        own: Any = super(_FusedAttention, with_children(self, identities))
        return own.forward(*args, **kwargs)


_IDENTITY = nn.Identity()


def _fused_rotary(original: Callable) -> Callable:
    """For all models of the family: it differs on a GPU alone."""

    def rotary(q: Tensor, k: Tensor, cos: Any, sin: Tensor, *args: Any, **kwargs: Any):
        """q [1, Hq, N, D], k [1, Hkv, N, D], cos and sin [1, N, D]; else as the original."""
        norms: list[Any] = [None, None]
        if isinstance(cos, NormedAngles):
            cos, *norms = cos.cos, cos.q_norm, cos.k_norm
        packed = q.dim() == 4 and q.shape[0] == cos.shape[0] == 1 and cos.shape[-1] == q.shape[-1]
        if args or kwargs or not packed or not _runs_fused(q):
            q, k = (x if norm is None else norm(x) for x, norm in zip((q, k), norms, strict=True))
            return original(q, k, cos, sin, *args, **kwargs)
        from tw_kernels.fused.rotary import Norm, rotary

        dtype = _out_dtype(q, cos, *(norm.weight for norm in norms if norm is not None))
        of_heads = [norm and Norm(norm.weight, norm.fused_eps, norm.fused_offset) for norm in norms]
        q, k = (x.squeeze(0).transpose(0, 1) for x in (q, k))
        q, k = rotary(q, k, cos.squeeze(0), sin.squeeze(0), dtype, *of_heads)
        return q.transpose(0, 1).unsqueeze(0), k.transpose(0, 1).unsqueeze(0)

    vars(rotary)["unfused"] = original
    return rotary
