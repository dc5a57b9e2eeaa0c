"""trie_decode: new tokens of many sequences attend to keys and values in shared pages.

Decoding is the same trie (docs/architecture.md, fact 6): sequences that were forked from one
another hold the same first pages. The radix trie of their page tables puts the readers of each run
of pages side by side, so that a run is fetched once for all of them and the partial results of the
runs on a path merge by log-sum-exp. One call serves any number of new tokens a sequence: decoding,
prefill in one piece or in chunks, and all of them in one batch.

A backend is a module of two functions and a constant:

    why_not(q, kv, options)                             None if it can run this call, else the
                                                        reason
    forward(q, kv, plan, scale, new_k, new_v, options)  -> out; new_k and new_v, tensors or None,
                                                        are written to their pages first
    CAN_BE_CAPTURED                                     whether a CUDA graph may hold a call: it
                                                        waits for nothing, and keeps nothing of a
                                                        plan that another may be copied into

Shapes: q, out [Q, Hq, D]; new_k, new_v [Q, Hkv, D]. options: ScoreOptions, whose sinks are float32
(float64 for a float64 q) and contiguous.

Which backend runs, unless `backend` or the environment variable TW_DECODE_BACKEND names one: the
first of TRIE_DECODE that can run the call: triton on CUDA, native on a CPU, reference otherwise.
Two are only ever asked for by name: cuda, which is experimental, and on a CPU triton, which would
run in Triton's interpreter.
"""

from __future__ import annotations

import os
from types import ModuleType

import torch
from torch import Tensor

from tw_kernels.decode import cuda, native, reference, triton
from tw_kernels.decode.plan import DecodePlan, PagedKV
from tw_kernels.scores import NO_OPTIONS, ScoreOptions, check_number, check_options

TRIE_DECODE: dict[str, ModuleType] = {
    "triton": triton,
    "native": native,
    "reference": reference,
    "cuda": cuda,
}


def trie_decode(
    q: Tensor,
    kv: PagedKV,
    plan: DecodePlan,
    scale: float | None = None,
    backend: str | None = None,
    *,
    new_k: Tensor | None = None,
    new_v: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax(scale * q k^T) v of every new token over its sequence up to itself. No gradients.

    A key or value that a token does not see has no effect on it, whatever it holds, in the backends
    native and reference; the others say in their docstrings what they do with a NaN.

    Args:
        q: [Q, Hq, D], the new tokens of the sequences in the order given to `DecodePlan.build`,
            each sequence's by position; padded to the plan's capacity.
        kv: pages of the layer, Hq a multiple of Hkv, in q's dtype.
        plan: on q's device.
        scale: default 1 / sqrt(D).
        backend: a name of TRIE_DECODE; default: see the module's docstring.
        new_k, new_v: [Q, Hkv, D], keys and values of the new tokens, written to their pages before
            anything reads them. Without them the pages must hold them already.
        window: a token at position p sees the keys at positions in (p - window, p]; default: all up
            to its own.
        softcap: scores become softcap * tanh(score / softcap) before the softmax; default: as they
            are.
        sinks: [Hq], of any floating dtype; one more logit in the denominator of each softmax of its
            head, which no value belongs to.

    Returns:
        out [Q, Hq, D], in q's order and dtype; 0 in padding rows.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, pages that kv does not have,
            a scale, window, softcap or sinks out of range, or a backend that cannot run the call,
            with the reason.
    """
    _check(q, kv, plan, new_k, new_v)
    scale = q.shape[-1] ** -0.5 if scale is None else check_number("scale", scale)
    options = check_options(q, window, softcap, sinks)
    if sinks is not None:
        wide = torch.promote_types(q.dtype, torch.float32)
        options = options._replace(sinks=sinks.detach().to(wide).contiguous())
    run = TRIE_DECODE[choose_backend(q, kv, backend, options)]
    return run.forward(q, kv, plan, scale, new_k, new_v, options)


def _check(
    q: Tensor, kv: PagedKV, plan: DecodePlan, new_k: Tensor | None, new_v: Tensor | None
) -> None:
    _, page_size, num_kv_heads, head_dim = kv.k_pages.shape
    if q.dim() != 3 or q.shape[2] != head_dim or not q.shape[1] or q.shape[1] % num_kv_heads:
        raise ValueError(
            "q must be [Q, Hq, D] with the D of the pages and Hq a multiple of their Hkv; "
            f"got {tuple(q.shape)} and pages {tuple(kv.k_pages.shape)}"
        )
    if q.shape[0] != plan.capacity.rows:
        raise ValueError(f"the plan has {plan.capacity.rows} query rows, but q {q.shape[0]}")
    if page_size != plan.page_size:
        raise ValueError(f"the plan is for pages of {plan.page_size}, but kv has {page_size}")
    if plan.num_pages > kv.num_pages:
        raise ValueError(f"the plan reads page {plan.num_pages - 1}, but kv has {kv.num_pages}")
    if (new_k is None) != (new_v is None):
        raise ValueError("new_k and new_v come together: give both or neither")
    given = [q, kv.k_pages, *(x for x in (new_k, new_v) if x is not None)]
    for x in given[2:]:
        if x.shape != (q.shape[0], num_kv_heads, head_dim):
            raise ValueError(
                f"new_k and new_v must be {(q.shape[0], num_kv_heads, head_dim)}, "
                f"got {tuple(x.shape)}"
            )
    if len({x.dtype for x in given}) > 1:
        raise ValueError(
            f"q, the pages, new_k and new_v must share a dtype; got {[x.dtype for x in given]}"
        )
    devices = [x.device for x in (*given, plan.buffer)]
    if len(set(devices)) > 1:
        raise ValueError(f"q, the pages, new_k, new_v and plan must share a device; got {devices}")


def choose_backend(
    q: Tensor, kv: PagedKV, name: str | None = None, options: ScoreOptions = NO_OPTIONS
) -> str:
    """The backend that runs this call: `name` if given, else by the module docstring's rule."""
    name = name or os.environ.get("TW_DECODE_BACKEND")
    if name and name not in TRIE_DECODE:
        raise ValueError(f"no backend {name!r} for trie_decode: {', '.join(TRIE_DECODE)}")
    named = {"cuda"} if q.device.type == "cuda" else {"cuda", "triton"}
    usual = [n for n in TRIE_DECODE if n not in named]
    reasons = {}
    for candidate in [name] if name else usual:
        reasons[candidate] = TRIE_DECODE[candidate].why_not(q, kv, options)
        if reasons[candidate] is None:
            return candidate
    why = "; ".join(f"{n}: {reason}" for n, reason in reasons.items())
    raise ValueError(f"trie_decode cannot run this call: {why}")
