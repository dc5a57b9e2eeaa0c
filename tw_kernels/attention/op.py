"""trie_attention: every token attends to itself and its ancestors in a trie.

The op takes one int per token, `subtree_ends`, as its whole mask (docs/architecture.md, fact 1);
backends find what else they need through the TrieLayout that owns that tensor.

A backend is a module of four functions:

    why_not(q, k, v, window, softcap)                        None if it can run this call, else the
                                                             reason
    plan(layout, q, window)                                  what it needs of the trie, for q's
                                                             device, dtype and head dim
    forward(q, k, v, plan, scale, softcap)                   -> out, lse
    backward(dout, q, k, v, out, lse, plan, scale, softcap)  -> dq, dk, dv

Shapes: q, out, dout, dq [N, Hq, D]; k, v, dk, dv [N, Hkv, D]; lse [Hq, N] (natural logarithm,
float32, or float64 for float64 inputs). scale is above 0. window and softcap are None where the
call has none, or a window that no path exceeds. A plan that costs something to build is kept in
`layout.memo`, so it is built once a trie.

Sinks are the op's, for all backends alike: one more logit in each softmax, of no value, rescales
out and adds to lse. The backend's backward gets those, and is right with them as they stand.

Which backend runs, unless `backend` or the environment variable TW_BACKEND names one:

    CUDA  cuda if it can run the call (Hopper, bfloat16 and float16, head dims 64 and 128, no window
          and no soft cap, kernels built), else triton, else segments, else dense. On one H100, 32
          query and 8 KV heads, bfloat16, in TFLOP/s of visible pairs, cuda against triton:

                                            forward      backward
              chain of 8,192, D 128         584 : 444    474 : 358
              chain of 16,384, D 128        607 : 449    420 : 372
              star of 16,384, D 128         568 : 414    472 : 349
              trajectory of 34,408, D 128   568 : 372    401 : 339
              64 tries of 512, D 128        206 : 147    161 : 107
              chain of 8,192, D 64          428 : 369    386 : 340

          (2026-11-26, b5af5a5, when cuda had coarse kernels alone.) float16 is not measured: its
          instructions and their rates are bfloat16's.
    CPU   native if it can run the call (all but float64), else segments, else dense. In bfloat16 on
          a processor with AMX native only up to NATIVE_PAIRS visible pairs: beyond, ATen's kernels
          behind segments win by their matrix instructions, which native has not.

flash (FlashAttention 4) is only ever asked for by name: it is not measured.
"""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any, Literal, overload

import torch
from torch import Tensor

from tw_kernels.attention import cuda, dense, flash4, native, segments, triton
from tw_kernels.cpu import bfloat16_instructions
from tw_kernels.scores import check_number, check_options
from tw_kernels.trie import TrieLayout

TRIE_ATTENTION: dict[str, ModuleType] = {
    "native": native,
    "triton": triton,
    "segments": segments,
    "dense": dense,
    "cuda": cuda,
    "flash": flash4,
}

# Visible pairs at which segments overtakes native in bfloat16 where ATen has AMX (two Xeon cores, 9
# heads of 64, forward and backward: native 2.6x faster at 0.3 M pairs, 1.1x at 4 M, 0.9x at 16 M).
# Without AMX it never does: with AVX512_BF16 native is 1.5x faster at 4 M pairs (two EPYC cores, a
# star of 4,096 tokens), with AVX2, where ATen emulates bfloat16, 6x at 16 M.
NATIVE_PAIRS = 8_000_000


@overload
def trie_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TrieLayout,
    scale: float | None = None,
    backend: str | None = None,
    return_lse: Literal[False] = False,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor: ...
@overload
def trie_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TrieLayout,
    scale: float | None = None,
    backend: str | None = None,
    *,
    return_lse: Literal[True],
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...
def trie_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TrieLayout,
    scale: float | None = None,
    backend: str | None = None,
    return_lse: bool = False,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q k^T) v over each token's path, differentiable once in q, k, v and sinks.

    A token that does not see a finite key or value is the same whatever it holds, to the last bit.
    How far a NaN or infinity reaches, the backends say in their docstrings: on native no further
    than what sees it, on native, segments and dense never into another trie of a pack.

    Args:
        q: [N, Hq, D], one row per trie token; float32, bfloat16 or float16 (float64 on the CPU).
        k, v: [N, Hkv, D], Hq a multiple of Hkv (grouped heads).
        layout: the trie's geometry, on q's device.
        scale: default 1 / sqrt(D).
        backend: "native", "triton", "segments", "dense", "cuda" or "flash"; default: see the
            module's docstring.
        return_lse: also return the log-sum-exp of each softmax. It carries no gradient.
        window: a token sees itself and its last window - 1 ancestors; default: all of them.
        softcap: a score s becomes softcap * tanh(s / softcap), s = scale * q k; default: stays s.
        sinks: [Hq], one more logit in the denominator of each softmax of a head, and in its lse;
            any floating dtype.

    Returns:
        out [N, Hq, D] in q's dtype; with return_lse, (out, lse [Hq, N], float32, natural log).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, nothing to attend (no token,
            head or head dim), a scale, softcap, window or sinks out of range, or a backend that
            cannot run the call, with the reason.
        RuntimeError: a gradient of the gradients is asked for.
    """
    _check(q, k, v, layout)
    scale = q.shape[-1] ** -0.5 if scale is None else check_number("scale", scale)
    options = check_options(q, window, softcap, sinks)
    name = backend or os.environ.get("TW_BACKEND") or ""
    out, lse = torch.ops.tw_kernels.trie_attention(
        q, k, v, layout.subtree_ends, scale, name, *options
    )
    return (out, lse) if return_lse else out


def _check(q: Tensor, k: Tensor, v: Tensor, layout: TrieLayout) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape:
        raise ValueError(f"q must be [N, Hq, D], k and v [N, Hkv, D]; got {shapes}")
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(f"at least one token, head and head dim are needed; got {shapes}")
    if q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(f"N and D must agree and Hq be a multiple of Hkv; got {shapes}")
    if q.shape[0] != layout.subtree_ends.shape[0]:
        raise ValueError(f"the trie has {layout.subtree_ends.shape[0]} tokens, but got {shapes}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must share a dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device == layout.subtree_ends.device:
        raise ValueError(
            f"q, k, v and the layout must share a device; got {q.device}, {k.device}, {v.device}, "
            f"{layout.subtree_ends.device}: use trie.layout(q.device)"
        )


def choose_backend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TrieLayout,
    name: str = "",
    window: int | None = None,
    softcap: float | None = None,
) -> str:
    """The backend that runs this call: `name` if given, else by the module docstring's rule."""
    if name:
        if name not in TRIE_ATTENTION:
            raise ValueError(f"no backend {name!r} for trie_attention: {', '.join(TRIE_ATTENTION)}")
        if reason := TRIE_ATTENTION[name].why_not(q, k, v, window, softcap):
            raise ValueError(f"trie_attention cannot run on backend {name!r}: {reason}")
        return name
    order = ["cuda", "triton", "segments", "dense"]
    if q.device.type == "cpu":
        many = q.dtype == torch.bfloat16 and layout.visible_pairs > NATIVE_PAIRS
        many = many and "AMX" in bfloat16_instructions()
        order = ["segments", "native", "dense"] if many else ["native", "segments", "dense"]
    reasons = {}
    for candidate in order:
        reasons[candidate] = TRIE_ATTENTION[candidate].why_not(q, k, v, window, softcap)
        if reasons[candidate] is None:
            return candidate
    why = "; ".join(f"{n}: {reason}" for n, reason in reasons.items())
    raise ValueError(f"no backend of trie_attention can run this call: {why}")


# Defined by schema: torch.library.custom_op checks every call for aliasing, which at a hundred
# tokens costs as much as the attention.
_FORWARD, _BACKWARD = "tw_kernels::trie_attention", "tw_kernels::trie_attention_backward"
_SINKS_BACKWARD = "tw_kernels::trie_attention_sinks_backward"
torch.library.define(
    _FORWARD,
    "(Tensor q, Tensor k, Tensor v, Tensor subtree_ends, float scale, str backend,"
    " int? window=None, float? softcap=None, Tensor? sinks=None) -> (Tensor, Tensor)",
)
torch.library.define(
    _BACKWARD,
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor subtree_ends,"
    " float scale, str backend, int? window=None, float? softcap=None) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    _SINKS_BACKWARD, "(Tensor dout, Tensor out, Tensor lse, Tensor sinks) -> Tensor"
)


def _run(q, k, v, subtree_ends, backend, window, softcap) -> tuple[ModuleType, Any]:
    """The backend of a call, and its plan."""
    layout = TrieLayout.of(subtree_ends)
    if window is not None and window >= layout.longest_path:
        window = None
    run = TRIE_ATTENTION[choose_backend(q, k, v, layout, backend, window, softcap)]
    return run, run.plan(layout, q, window)


@torch.library.impl(_FORWARD, ("cpu", "cuda"))
def _forward(q, k, v, subtree_ends, scale, backend, window=None, softcap=None, sinks=None):
    run, plan = _run(q, k, v, subtree_ends, backend, window, softcap)
    out, lse = run.forward(q, k, v, plan, scale, softcap)
    if sinks is None:
        return out, lse
    with_sinks = torch.logaddexp(lse, sinks.to(lse.dtype).unsqueeze(-1))
    share = (lse - with_sinks).exp().T.unsqueeze(-1)  # of the softmax that is not the sink's
    return (out * share).to(out.dtype), with_sinks


@torch.library.register_fake(_FORWARD)
def _(q, k, v, subtree_ends, scale, backend, window=None, softcap=None, sinks=None):
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=wide)


@torch.library.impl(_BACKWARD, ("cpu", "cuda"))
def _backward(dout, q, k, v, out, lse, subtree_ends, scale, backend, window=None, softcap=None):
    run, plan = _run(q, k, v, subtree_ends, backend, window, softcap)
    return run.backward(dout, q, k, v, out, lse, plan, scale, softcap)


@torch.library.register_fake(_BACKWARD)
def _(dout, q, k, v, out, lse, subtree_ends, scale, backend, window=None, softcap=None):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@torch.library.impl(_SINKS_BACKWARD, ("cpu", "cuda"))
def _sinks_backward(dout, out, lse, sinks):
    # As for any other logit, p (dout v - delta), with a v of 0 and delta = dout out.
    delta = (dout.to(lse.dtype) * out).sum(-1).T
    p = (sinks.to(lse.dtype).unsqueeze(-1) - lse).exp()
    return -(p * delta).sum(-1).to(sinks.dtype)


@torch.library.register_fake(_SINKS_BACKWARD)
def _(dout, out, lse, sinks):
    return sinks.new_empty(sinks.shape)


def _save(ctx, inputs, output):
    q, k, v, subtree_ends, ctx.scale, ctx.backend, ctx.window, ctx.softcap, sinks = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, subtree_ends, sinks)


def _differentiate(ctx, dout, _dlse):
    q, k, v, out, lse, subtree_ends, sinks = ctx.saved_tensors
    grads = torch.ops.tw_kernels.trie_attention_backward(
        *(dout, q, k, v, out, lse, subtree_ends),
        *(ctx.scale, ctx.backend, ctx.window, ctx.softcap),
    )
    dsinks = None
    if ctx.needs_input_grad[-1]:
        dsinks = torch.ops.tw_kernels.trie_attention_sinks_backward(dout, out, lse, sinks)
    return *grads, None, None, None, None, None, dsinks


def _differentiate_twice(ctx, *grads):
    raise RuntimeError("trie_attention is differentiable once: its gradients have none themselves")


torch.library.register_autograd(_FORWARD, _differentiate, setup_context=_save)
torch.library.register_autograd(_BACKWARD, _differentiate_twice)
torch.library.register_autograd(_SINKS_BACKWARD, _differentiate_twice)
