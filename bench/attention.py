"""Trie attention against PyTorch's attention functions: `python -m bench.attention --help`.

Each row times one implementation on one trie: on a CPU the forward pass, and both passes; on CUDA
the forward pass, and the backward pass by itself. The peers are described in
bench/attention_peers.py.

    TFLOP/s     floating-point operations of the *visible* pairs over the time: 4 D Hq a pair
                forward, 10 D Hq backward. Operations on hidden pairs and on further copies of a
                token do not count. The causal peers are credited with N (N + 1) / 2 pairs
    GB/s        bytes of q, k, v and out, and of their gradients with a backward pass, each once,
                over the time
    x dense, x flex, x unrolled, x varlen
                how many times faster than SDPA with a dense mask, FlexAttention with a prebuilt
                block mask, the paths one at a time, the paths in one varlen_attn
    of causal, of cuDNN
                TFLOP/s as a share of causal SDPA's, and of cuDNN's causal attention, on the same
                number of tokens
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench import shapes
from bench.attention_peers import (
    CAUSAL,
    CUDNN,
    DENSE,
    FLEX,
    PEERS,
    UNROLLED_SDPA,
    UNROLLED_VARLEN,
)
from bench.attention_setup import OURS, AttentionSetup, Pass, Problem
from bench.availability import interpreted
from bench.running import suite_main
from bench.suite import Options, Peer, Row, Skip, Suite, UsageError, at_least_one
from tw_kernels import trie_attention
from tw_kernels.attention import cuda
from tw_kernels.attention.op import TRIE_ATTENTION

DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}
PASSES: dict[str, tuple[Pass, ...]] = {"cpu": ("fwd", "fwd+bwd"), "cuda": ("fwd", "bwd")}


@dataclass
class AttentionOptions(Options):
    """Options of bench.attention, in addition to those of every benchmark.

    Args:
        heads: query heads. Default: 9, on CUDA 32, with --quick 4.
        kv_heads: key-value heads. Default: 9, on CUDA 8, with --quick 2.
        head_dims: head dims. Default: 64, on CUDA 64 and 128.
        window: a token sees itself and its last window - 1 ancestors. Default: all of them.
    """

    heads: int | None = None
    kv_heads: int | None = None
    head_dims: list[int] | None = None
    window: int | None = None


def _prepare(setup: AttentionSetup, backend: str | None) -> Callable[[int], Any]:
    inputs = [setup.inputs(i) for i in range(setup.input_sets)]
    window = setup.problem.window
    if backend:
        if backend == setup.automatic:
            raise Skip("the automatic choice")
        q, k, v, _ = inputs[0]
        if reason := TRIE_ATTENTION[backend].why_not(q, k, v, window):
            raise Skip(reason)
        start, end = setup.layout.roots.astype(int).T
        squares = int(((end - start) ** 2).sum())
        setup.limit(squares if backend == "dense" else setup.problem.visible_pairs)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = trie_attention(q, k, v, setup.layout, backend=backend, window=window)
        assert isinstance(out, Tensor)
        return out

    return lambda i: setup.run(attend, *inputs[i])


def _ours(backend: str | None = None) -> Peer[AttentionSetup]:
    def why_absent(device: str) -> str | None:
        if backend is None:
            return None
        q = torch.empty(1, 1, 64, dtype=torch.bfloat16, device=device)
        return interpreted(backend, device) or TRIE_ATTENTION[backend].why_not(q, q, q)

    name = f"{OURS}: {backend}" if backend else OURS
    return Peer(name, functools.partial(_prepare, backend=backend), True, why_absent)


def _of_grain(grain: str, cost: float) -> Peer[AttentionSetup]:
    """The CUDA kernels of that grain, where the rule weighs one against the other."""

    def prepare(setup: AttentionSetup) -> Callable[[int], Any]:
        if setup.layout.waste(cuda.OWN_ROWS, cuda.OWN_ROWS) <= cuda.FINE_COST:
            raise Skip("long paths: coarse blocks waste too little")
        q, k, v, _ = setup.inputs(0)
        if reason := cuda.why_not(q, k, v, setup.problem.window):
            raise Skip(reason)
        inputs = [setup.inputs(i) for i in range(setup.input_sets)]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return trie_attention(q, k, v, setup.layout, backend="cuda")

        def call(i: int) -> Any:
            rule, cuda.FINE_COST = cuda.FINE_COST, cost  # read by forward and backward
            try:
                return setup.run(attend, *inputs[i])
            finally:
                cuda.FINE_COST = rule

        return call

    def why_absent(device: str) -> str | None:
        q = torch.empty(1, 1, 64, dtype=torch.bfloat16, device=device)
        return cuda.why_not(q, q, q)

    return Peer(f"{OURS}: cuda, {grain}", prepare, True, why_absent)


def cases(options: Options) -> list[shapes.Case]:
    star, trajectory, chain = shapes.star, shapes.trajectory, shapes.chain
    if options.quick:
        return [star(1024), trajectory(300, 2), shapes.pack(8, 64)]
    if options.device == "cuda":
        return [
            *(chain(n) for n in (8192, 16384)),
            *(star(n) for n in (2048, 4096, 8192, 16384, 32768)),
            *(trajectory(n, blocks) for n, blocks in ((2048, 3), (8192, 4), (34408, 6))),
            shapes.pack(32, 128),
            shapes.pack(64, 512),
            shapes.tree_of_thoughts("sorting128ToT", 1),
            shapes.tree_of_thoughts("docmergeToT", 4),
        ]
    return [
        *(trajectory(n, blocks) for n, blocks in ((100, 1), (512, 2), (2048, 3))),
        shapes.pack(32, 128),
        *(star(n) for n in (1024, 4096, 8192)),
        shapes.tree_of_thoughts("sorting128ToT", 17),
        trajectory(8192, 4),
        shapes.tree_of_thoughts("docmergeToT", 4),
        trajectory(34408, 6),
    ]


def setups(options: AttentionOptions) -> Iterator[AttentionSetup]:
    if os.environ.get("TW_BACKEND"):
        raise UsageError("unset TW_BACKEND: it would rename the automatic choice")
    at_least_one(options, "window")
    cpu = options.device == "cpu"
    usual = (4, 2) if options.quick else (9, 9) if cpu else (32, 8)
    heads, kv_heads = options.heads or usual[0], options.kv_heads or usual[1]
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise UsageError(f"--heads {heads} is not a multiple of --kv_heads {kv_heads}")
    for case in cases(options):
        for head_dim in options.head_dims or ([64] if cpu else [64, 128]):
            problem = Problem(case, options.device, heads, kv_heads, head_dim, options.window)
            for dtype in DTYPES[options.device]:
                for what in PASSES[options.device]:
                    yield AttentionSetup(problem, dtype, what)


def relate(rows: dict[str, Row]) -> None:
    for name, causal in (("of_causal", CAUSAL), ("of_cudnn", CUDNN)):
        if causal in rows:
            for row in rows.values():
                row[name] = row["tflops"] / rows[causal]["tflops"]


SUITE = Suite(
    name="attention",
    options=AttentionOptions,
    setups=setups,
    peers=[
        _ours(),
        *map(_ours, TRIE_ATTENTION),
        _of_grain("coarse", math.inf),
        _of_grain("fine", 0.0),
        *PEERS,
    ],
    columns={"backend": "backend", "of_causal": "of causal", "of_cudnn": "of cuDNN"},
    versus={
        DENSE: "x dense",
        FLEX: "x flex",
        UNROLLED_SDPA: "x unrolled",
        UNROLLED_VARLEN: "x varlen",
    },
    relate=relate,
)

if __name__ == "__main__":
    raise SystemExit(suite_main(SUITE))
