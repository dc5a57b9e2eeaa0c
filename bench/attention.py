"""Trie attention against PyTorch's attentions: `python -m bench.attention --help`.

Each row times one implementation on one trie, forward or forward and backward. What the peers are:
bench/peers.py.

    TFLOP/s     floating-point operations of the *visible* pairs over the time: 4 D Hq a pair
                forward, 10 D Hq backward. Work on hidden pairs earns nothing, nor does computing a
                token once for each path it is on. The causal peers are credited with their own
                pairs, half the square
    GB/s        q, k, v and out, and backward all four gradients, each once, over the time
    x dense, x flex, x unrolled
                how many times faster than SDPA with a dense mask, than FlexAttention with its block
                mask at hand, than the paths one by one
    of causal   TFLOP/s as a share of causal SDPA's on as many tokens
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench import shapes
from bench.attention_setup import OURS, AttentionSetup, Problem
from bench.frame import Options, Peer, Row, Skip, Suite, UsageError, main
from bench.peers import (
    CAUSAL,
    DENSE,
    FLEX,
    PEERS,
    UNROLLED_SDPA,
    UNROLLED_VARLEN,
)
from tw_kernels import trie_attention
from tw_kernels.attention.op import TRIE_ATTENTION

DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}


@dataclass
class AttentionOptions(Options):
    """Options of bench.attention, beside those of every benchmark.

    Args:
        heads: query heads. Default: 9, on CUDA 32, with --quick 4.
        kv_heads: key-value heads. Default: 9, on CUDA 8, with --quick 2.
        head_dims: head dims. Default: 64, on CUDA 64 and 128.
    """

    heads: int | None = None
    kv_heads: int | None = None
    head_dims: list[int] | None = None


def _ours(setup: AttentionSetup, backend: str | None) -> Callable[[int], Any]:
    inputs = [setup.inputs(i) for i in range(setup.input_sets)]
    if backend:
        if backend == setup.automatic:
            raise Skip("the automatic choice")
        q, k, v, _ = inputs[0]
        if reason := TRIE_ATTENTION[backend].why_not(q, k, v):
            raise Skip(reason)
        start, end = setup.layout.roots.astype(int).T
        squares = int(((end - start) ** 2).sum())
        setup.limit(squares if backend == "dense" else setup.layout.visible_pairs)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = trie_attention(q, k, v, setup.layout, backend=backend)
        assert isinstance(out, Tensor)
        return out

    return lambda i: setup.run(attend, *inputs[i])


def _why_no_backend(name: str, device: str) -> str | None:
    if name == "triton" and device == "cpu":
        return "runs in Triton's interpreter on a CPU, which is for tests"
    q = torch.empty(1, 1, 64, dtype=torch.bfloat16, device=device)
    return TRIE_ATTENTION[name].why_not(q, q, q)


def cases(options: Options) -> list[shapes.Case]:
    star, trajectory = shapes.star, shapes.trajectory
    if options.quick:
        return [star(1024), trajectory(300, 2), shapes.pack(8, 64)]
    if options.device == "cuda":
        return [
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
    cpu = options.device == "cpu"
    usual = (4, 2) if options.quick else (9, 9) if cpu else (32, 8)
    heads, kv_heads = options.heads or usual[0], options.kv_heads or usual[1]
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise UsageError(f"--heads {heads} is not a multiple of --kv_heads {kv_heads}")
    for case in cases(options):
        for head_dim in options.head_dims or ([64] if cpu else [64, 128]):
            problem = Problem(case, options.device, heads, kv_heads, head_dim)
            for dtype in DTYPES[options.device]:
                for backward in (False, True):
                    yield AttentionSetup(problem, dtype, backward)


def relate(rows: dict[str, Row]) -> None:
    if CAUSAL in rows:
        for row in rows.values():
            row["of_causal"] = row["tflops"] / rows[CAUSAL]["tflops"]


SUITE = Suite(
    name="attention",
    options=AttentionOptions,
    setups=setups,
    peers=[
        Peer(OURS, functools.partial(_ours, backend=None), ours=True),
        *(
            Peer(
                f"{OURS}: {name}",
                functools.partial(_ours, backend=name),
                ours=True,
                why_absent=functools.partial(_why_no_backend, name),
            )
            for name in TRIE_ATTENTION
        ),
        *PEERS,
    ],
    columns={"backend": "backend", "of_causal": "of causal"},
    versus={
        DENSE: "x dense",
        FLEX: "x flex",
        UNROLLED_SDPA: "x unrolled",
        UNROLLED_VARLEN: "x varlen",
    },
    relate=relate,
)

if __name__ == "__main__":
    raise SystemExit(main(SUITE))
