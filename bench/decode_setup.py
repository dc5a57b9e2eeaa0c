"""The setup of bench.decode: the live sequences of a case, their keys and values in pages, and the
check.

The page tables are a random permutation, as in a pool after some use; sequences that were forked
from one another share their full pages.
"""

from __future__ import annotations

import statistics
from functools import cached_property
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench import shapes
from bench.oracle import worst_row
from bench.roofline import Work
from bench.suite import Row, Setup
from tw_kernels import DecodePlan, PagedKV
from tw_kernels.decode.costs import Heads, of_device
from tw_kernels.decode.op import choose_backend
from tw_kernels.scores import NO_OPTIONS, ScoreOptions

PAGE_SIZE = 16
PLAN_REPEATS = 20
# As in bench/oracle.py, but tighter: there are no gradients, and one wrong key among a thousand
# changes a row by less.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


class Paging(NamedTuple):
    """Page tables of the sequences: int32 page ids of each."""

    page_size: int
    tables: list[np.ndarray]
    num_pages: int


class Problem:
    """The live sequences of one case and their values: the data that its dtypes share.

    Args:
        heads: query heads, key-value heads and head dim.
        window: a token sees itself and the window - 1 before it; None: all of them.
    """

    def __init__(
        self,
        case: shapes.Case,
        device: str,
        heads: tuple[int, int, int],
        window: int | None = None,
    ):
        self.case, self.device, self.window = case, device, window
        self.heads, self.kv_heads, self.head_dim = heads
        # More than one, as a model has layers: a call does not find its inputs in the cache.
        self.input_sets = 2 if device == "cpu" else 3

    @cached_property
    def nodes(self) -> list[Tensor]:
        """The trie tokens of each sequence, int64 [length]; the last one is the new token. In
        preorder, as an engine orders them: sequences that share tokens are neighbours."""
        trie = self.case.trie
        return [trie.path_nodes(int(i)) for i in trie.path_ends.argsort()]

    @cached_property
    def lengths(self) -> list[int]:
        return [len(nodes) for nodes in self.nodes]

    @cached_property
    def seen(self) -> list[Tensor]:
        """The trie tokens that each sequence's new token sees, int64."""
        return [nodes[-self.window :] if self.window else nodes for nodes in self.nodes]

    def paging(self, page_size: int) -> Paging:
        """Sequences share full pages of equal tokens, and each has a last page of its own."""
        ends = []  # the last token of each page, which identifies it
        for nodes in self.nodes:
            full = nodes.numpy()[page_size - 1 :: page_size]
            ends.append(full if len(nodes) % page_size == 0 else np.append(full, int(nodes[-1])))
        known, pages = np.unique(np.concatenate(ends), return_inverse=True)
        pages = np.random.default_rng(0).permutation(len(known))[pages].astype(np.int32)
        tables = np.split(pages, np.cumsum([len(e) for e in ends])[:-1])
        return Paging(page_size, tables, len(known))

    @cached_property
    def values(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """q [S, Hq, D] and k, v [trie tokens, Hkv, D], bfloat16, for each set of inputs."""
        n = len(self.case.trie)
        rng = torch.Generator(self.device).manual_seed(n)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=rng, device=self.device).bfloat16()

        kv = n, self.kv_heads, self.head_dim
        q = len(self.nodes), self.heads, self.head_dim
        return [(normal(*q), normal(*kv), normal(*kv)) for _ in range(self.input_sets)]

    @cached_property
    def expected(self) -> list[Tensor]:
        """The results, float64 [S, Hq, D] per set of inputs, from the definition, without pages."""
        group = self.heads // self.kv_heads
        outs = []
        for q, k, v in self.values:
            rows = q.double().unflatten(1, (self.kv_heads, group))
            out = torch.empty_like(rows)
            for s, nodes in enumerate(self.seen):
                at = nodes.to(self.device)
                ks, vs = (x[at].double().transpose(0, 1) for x in (k, v))  # [Hkv, length, D]
                p = (rows[s] @ ks.mT * self.head_dim**-0.5).softmax(-1)
                out[s] = p @ vs
            outs.append(out.flatten(1, 2))
        return outs


class DecodeSetup(Setup):
    """One problem in one dtype.

    Attributes:
        measured: peer of ours -> entries of its row that do not depend on the time of a call.
    """

    def __init__(self, problem: Problem, dtype: torch.dtype):
        self.problem, self.dtype = problem, dtype
        self.device, self.input_sets = problem.device, problem.input_sets
        self.measured: dict[str, Row] = {}

    @property
    def key(self) -> Row:
        p = self.problem
        trie = p.case.trie
        return {
            "case": p.case.name,
            "sequences": trie.num_paths,
            "n": len(trie),
            "sharing": p.case.unrolled / len(trie),
            "dtype": str(self.dtype).removeprefix("torch."),
            "heads": p.heads,
            "kv_heads": p.kv_heads,
            "head_dim": p.head_dim,
        } | ({} if p.window is None else {"window": p.window})

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of the keys and values of so many tokens."""
        return 2 * tokens * self.problem.kv_heads * self.problem.head_dim * self.dtype.itemsize

    def inputs(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """q [S, Hq, D] and k, v [trie tokens, Hkv, D] in the setup's dtype."""
        q, k, v = (x.to(self.dtype) for x in self.problem.values[i])
        return q, k, v

    def pages(self, paging: Paging, k: Tensor, v: Tensor, new: bool) -> PagedKV:
        """Pages with the keys and values [trie tokens, Hkv, D] of the sequences, without those of
        the new tokens unless `new`; 0 elsewhere."""
        p, size = self.problem, paging.page_size
        shape = paging.num_pages, size, p.kv_heads, p.head_dim
        k_pages, v_pages = torch.zeros(2, *shape, dtype=self.dtype, device=self.device)
        for table, nodes in zip(paging.tables, p.nodes, strict=True):
            old = torch.arange(len(nodes) if new else len(nodes) - 1)
            slots = torch.from_numpy(table).long()[old // size] * size + old % size
            at, nodes = slots.to(self.device), nodes[old].to(self.device)
            k_pages.flatten(0, 1)[at], v_pages.flatten(0, 1)[at] = k[nodes], v[nodes]
        return PagedKV(k_pages, v_pages)

    def plan(self, paging: Paging, share: bool) -> tuple[DecodePlan, float]:
        """A plan, and the median seconds to build it."""
        p = self.problem
        step = paging.tables, p.lengths, [1] * len(p.nodes), paging.page_size, self.device
        costs = of_device(torch.device(self.device), Heads(p.heads, p.kv_heads, p.head_dim))
        samples = []
        for _ in range(PLAN_REPEATS):
            start = perf_counter()
            DecodePlan.build(*step, share=share, costs=costs)
            samples.append(perf_counter() - start)
        return DecodePlan.build(*step, share=share, costs=costs), statistics.median(samples)

    def check(self, peer: str, result: Tensor, inputs: int) -> str | None:
        error, tolerance = worst_row(result, self.problem.expected[inputs]), TOLERANCE[self.dtype]
        if error <= tolerance:
            return None
        return f"out is off by {error:.1e} of a row, more than {tolerance:.0e}"

    @property
    def sample(self) -> tuple[Tensor, PagedKV]:
        """A q and pages of the setup's shapes, as the choice of a backend takes them."""
        p = self.problem
        q = torch.empty(1, p.heads, p.head_dim, dtype=self.dtype, device=self.device)
        pages = q.new_empty(1, PAGE_SIZE, p.kv_heads, p.head_dim)
        return q, PagedKV(pages, pages)

    @property
    def options(self) -> ScoreOptions:
        return NO_OPTIONS._replace(window=self.problem.window)

    @property
    def automatic(self) -> str:
        """The backend that runs where none is named."""
        return choose_backend(*self.sample, options=self.options)

    def work(self, peer: str) -> Work:
        """Of the keys and values that some query sees, each once."""
        p = self.problem
        read = len(torch.cat(p.seen).unique())
        rows = 2 * len(p.nodes) * p.heads * p.head_dim * self.dtype.itemsize  # of q and out
        flops = 4 * sum(map(len, p.seen)) * p.heads * p.head_dim
        return Work(flops, self.kv_bytes(read) + rows, self.key["dtype"])

    def figures(self, peer: str, seconds: float) -> Row:
        seen = self.problem.seen
        return {
            "unique_kv_bytes": self.kv_bytes(len(torch.cat(seen).unique())),
            "unshared_kv_bytes": self.kv_bytes(sum(map(len, seen))),
            **self.measured.get(peer, {}),
        }
