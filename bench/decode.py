"""One decode step of one layer, all live sequences at once: `python -m bench.decode --help`.

Each row times one implementation on one set of live sequences, one new token each. Keys and values
lie in pages of 16 tokens (bench/decode_setup.py). Our rows also write the new keys and values; for
the other peers (bench/decode_peers.py) they are in the pages already. On CUDA every call is
replayed from a graph, as an engine makes it (bench/graphs.py).

    ours                  the plan with sharing: each run of pages is read once for all sequences
                          that have it
    ours: <backend>       the same by a backend that is not the automatic choice
    ours, sharing off     the same kernel, every sequence by itself

    sharing     tokens of all sequences / tokens of their trie: upper bound of what sharing saves
    plan us     microseconds to build our plan on the host. Not in `ms`: all layers of a step use
                one plan
    TFLOP/s     of 4 D Hq operations a visible pair, over the time
    GB/s        bytes of the keys and values of the trie's tokens, of queries and of results, each
                once, over the time
    x floor     time over the floor, the longer of those bytes at the rate of a copy and those
                operations at the rate of a matrix product, both measured in the same run
    x off, x padded, x varlen, x cascade   how many times faster than those peers
    memory      tokens that the allocated pages have room for / tokens of the trie
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bench import shapes
from bench.availability import interpreted
from bench.decode_peers import CASCADE, PADDED, PEERS, VARLEN
from bench.decode_setup import PAGE_SIZE, DecodeSetup, Problem
from bench.graphs import replayed
from bench.running import suite_main
from bench.suite import Options, Peer, Row, Skip, Suite, UsageError, at_least_one
from tw_kernels import PagedKV, trie_decode
from tw_kernels.decode.op import TRIE_DECODE
from tw_kernels.scores import NO_OPTIONS

OURS, UNSHARED = "ours", "ours, sharing off"
DTYPES = (torch.float32, torch.bfloat16)
THREADS = (1, 2, 4, 8, 16)  # of one rollout: shows how the time grows with the number of threads


@dataclass
class DecodeOptions(Options):
    """Options of bench.decode, in addition to those of every benchmark.

    Args:
        heads, kv_heads, head_dim: query heads, key-value heads and head dim. Default: 9, 3 and 64,
            on CUDA also 32, 8 and 128.
        window: a token sees itself and the window - 1 before it. Default: all of them.
    """

    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    window: int | None = None


def _prepare(
    setup: DecodeSetup, peer: str, share: bool, backend: str | None
) -> Callable[[int], Tensor]:
    if backend:
        if backend == setup.automatic:
            raise Skip("the automatic choice")
        if reason := TRIE_DECODE[backend].why_not(*setup.sample, setup.options):
            raise Skip(reason)
    p = setup.problem
    paging = p.paging(PAGE_SIZE)
    plan, seconds = setup.plan(paging, share)
    setup.measured[peer] = {
        "backend": backend or setup.automatic,
        "plan_us": seconds * 1e6,
        "kv_memory": paging.num_pages * PAGE_SIZE / len(p.case.trie),
    }
    last = torch.stack([nodes[-1] for nodes in p.nodes]).to(setup.device)
    calls = []
    for i in range(setup.input_sets):
        q, k, v = setup.inputs(i)
        calls.append((q, setup.pages(paging, k, v, new=False), k[last], v[last]))

    def call(i: int) -> Tensor:
        q, kv, new_k, new_v = calls[i]
        given = {"backend": backend, "new_k": new_k, "new_v": new_v, "window": p.window}
        return trie_decode(q, kv, plan, **given)

    return call


def _ours(name: str, share: bool = True, backend: str | None = None) -> Peer[DecodeSetup]:
    def why_absent(device: str) -> str | None:
        if backend is None:
            return None
        q = torch.empty(1, 1, 64, dtype=torch.bfloat16, device=device)
        pages = q.new_empty(1, PAGE_SIZE, 1, 64)
        reason = interpreted(backend, device)
        return reason or TRIE_DECODE[backend].why_not(q, PagedKV(pages, pages), NO_OPTIONS)

    prepare = functools.partial(_prepare, peer=name, share=share, backend=backend)
    return Peer(name, prepare, ours=True, why_absent=why_absent)


OUR_PEERS = [
    _ours(OURS),
    *(_ours(f"{OURS}: {name}", backend=name) for name in TRIE_DECODE if name != "reference"),
    _ours(UNSHARED, share=False),
]


def cases(options: Options) -> list[shapes.Case]:
    fork, tree = shapes.fork, shapes.tree_of_thoughts
    if options.quick:
        return [fork(2, 4, 512, 64), tree("sorting128ToT", 17)]
    if options.device == "cuda":
        return [
            *(fork(1, threads, 8192, 128) for threads in THREADS),
            *(fork(rollouts, 8, 8192, 128) for rollouts in (4, 8, 16, 64)),
            *(fork(8, 8, prefix, 512) for prefix in (512, 2048, 32768)),
            fork(64, 16, 2048, 64),
            fork(16, 4, 4096, 4096),
            tree("sorting128ToT", 1),
            tree("docmergeToT", 4),
        ]
    return [
        *(fork(1, threads, 8192, 128) for threads in THREADS),
        fork(1, 8, 512, 64),
        fork(4, 8, 2048, 128),
        fork(4, 8, 8192, 128),
        fork(2, 4, 32768, 256),
        fork(4, 4, 2048, 2048),
        fork(16, 8, 1024, 64),
        tree("sorting128ToT", 17),
        tree("docmergeToT", 4),
    ]


def setups(options: DecodeOptions) -> Iterator[DecodeSetup]:
    if os.environ.get("TW_DECODE_BACKEND"):
        raise UsageError("unset TW_DECODE_BACKEND: it would rename our backend")
    heads, kv_heads, head_dim = options.heads or 9, options.kv_heads or 3, options.head_dim or 64
    if min(heads, kv_heads, head_dim) < 1 or heads % kv_heads:
        raise UsageError(f"--heads {heads} is not a multiple of --kv_heads {kv_heads}")
    at_least_one(options, "window")
    sizes = [(heads, kv_heads, head_dim)]
    if options.device == "cuda" and not (options.heads or options.kv_heads or options.head_dim):
        sizes.append((32, 8, 128))
    for case in cases(options):
        for size in sizes:
            problem = Problem(case, options.device, size, options.window)
            for dtype in DTYPES:
                yield DecodeSetup(problem, dtype)


def relate(rows: dict[str, Row]) -> None:
    for row in rows.values():
        row["of_floor"] = 1 / row["roofline"]


SUITE = Suite(
    name="decode",
    options=DecodeOptions,
    setups=setups,
    peers=[
        *map(replayed, OUR_PEERS),
        *map(replayed, PEERS),
    ],
    columns={
        "backend": "backend",
        "of_floor": "x floor",
        "graph": "graph",
        "plan_us": "plan us",
        "kv_memory": "memory",
    },
    relate=relate,
    versus={UNSHARED: "x off", PADDED: "x padded", VARLEN: "x varlen", CASCADE: "x cascade"},
)

if __name__ == "__main__":
    raise SystemExit(suite_main(SUITE))
