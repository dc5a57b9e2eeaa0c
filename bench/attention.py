"""Trie attention against PyTorch's attentions: `python -m bench.attention --help`.

Each row times one implementation on one trie, forward or forward and backward.

    TFLOP/s   floating-point operations of the *visible* pairs over the time: 4 D Hq a pair forward,
              10 D Hq backward. Work on hidden pairs earns nothing.
    x dense   how many times faster than SDPA with a dense mask
    x flex    how many times faster than FlexAttention with its block mask at hand
    roofline  TFLOP/s as a share of causal SDPA's on as many tokens (its pairs are half the square)

Inputs are normal and exact in bfloat16, so that one float64 reference (bench/oracle.py) judges
every dtype. Where the reference would be dear, it takes some of the heads: `checked_heads`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bench import shapes
from bench.frame import Options, Peer, Row, Skip, Suite, UsageError, main
from bench.oracle import TOLERANCE, Reference, reference, worst_row
from bench.peers import CAUSAL, DENSE, FLEX, PEERS
from tw_kernels import TrieLayout, trie_attention
from tw_kernels.attention import choose_backend
from tw_kernels.backends import TRIE_ATTENTION

OURS = "ours"
FORWARD, BACKWARD = 4, 10  # operations for each visible pair, head and head dim
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}
# A call of more operations is skipped (but never our automatic choice): ten seconds, about.
MOST_OPERATIONS = {"cpu": 1e12, "cuda": float("inf")}
# Operations that the float64 reference of a case may take before it leaves heads out.
MOST_REFERENCE_OPERATIONS = {"cpu": 5e10, "cuda": 2e13}


@dataclass
class AttentionOptions(Options):
    """Options of bench.attention, beside those of every benchmark.

    Args:
        heads: query heads. Default: 9, on CUDA 32.
        kv_heads: key-value heads. Default: 9, on CUDA 8.
        head_dims: head dims. Default: 64, on CUDA 64 and 128.
    """

    heads: int | None = None
    kv_heads: int | None = None
    head_dims: list[int] | None = None


class Problem:
    """One case at one set of head counts: what its dtypes and passes share."""

    def __init__(self, case: shapes.Case, device: str, heads: int, kv_heads: int, head_dim: int):
        self.case, self.device = case, device
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.input_sets = 1 if device == "cpu" else 3
        self.memo: dict[Any, Any] = {}

    @cached_property
    def layout(self) -> TrieLayout:
        return self.case.trie.layout(self.device)

    @cached_property
    def values(self) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """q [N, Hq, D], k, v [N, Hkv, D] and dout [N, Hq, D], bfloat16, for each set of inputs."""
        n, d = self.layout.num_tokens, self.head_dim
        rng = torch.Generator(self.device).manual_seed(n)

        def normal(heads: int) -> Tensor:
            return torch.randn(n, heads, d, generator=rng, device=self.device).bfloat16()

        h, g = self.heads, self.kv_heads
        return [(normal(h), normal(g), normal(g), normal(h)) for _ in range(self.input_sets)]

    def expected(self, inputs: int, causal: bool) -> Reference:
        key = "expected", inputs, causal
        if key not in self.memo:
            ends, pairs = self.layout.subtree_ends, self.layout.visible_pairs
            if causal:
                n = ends.numel()
                ends, pairs = torch.full_like(ends, n), n * (n + 1) // 2
            one = (FORWARD + BACKWARD) * pairs * self.head_dim * self.heads // self.kv_heads
            fit = int(MOST_REFERENCE_OPERATIONS[self.device] / one)
            count = min(max(1, fit), self.kv_heads)
            step = self.kv_heads // count
            # The last head is always there: a mistake in head indexing shows on it.
            chosen = list(range(self.kv_heads - 1, -1, -step))[:count][::-1]
            self.memo[key] = reference(*self.values[inputs], ends, chosen)
        return self.memo[key]


class AttentionSetup:
    """One problem in one dtype, forward or forward and backward."""

    def __init__(self, problem: Problem, dtype: torch.dtype, backward: bool):
        self.problem, self.dtype, self.backward = problem, dtype, backward
        self.device, self.input_sets = problem.device, problem.input_sets
        self.group = problem.heads // problem.kv_heads

    @property
    def key(self) -> Row:
        p = self.problem
        return {
            "case": p.case.name,
            "n": self.layout.num_tokens,
            "density": self.layout.density,
            "dtype": str(self.dtype).removeprefix("torch."),
            "pass": "fwd+bwd" if self.backward else "fwd",
            "heads": p.heads,
            "kv_heads": p.kv_heads,
            "head_dim": p.head_dim,
        }

    @property
    def layout(self) -> TrieLayout:
        return self.problem.layout

    @property
    def causal_pairs(self) -> int:
        return self.layout.num_tokens * (self.layout.num_tokens + 1) // 2

    def operations(self, pairs: int) -> int:
        each = FORWARD + BACKWARD if self.backward else FORWARD
        return each * pairs * self.problem.heads * self.problem.head_dim

    def limit(self, pairs: int, also: str = "") -> None:
        """Raises Skip if computing so many pairs takes too long."""
        operations, most = self.operations(pairs), MOST_OPERATIONS[self.device]
        if operations > most:
            why = f"{operations / 1e12:.1f} TFLOP a call, over the limit of {most / 1e12:.0f}"
            raise Skip(f"{why}; {also}" if also else why)

    def inputs(self, i: int, batched: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and dout as leaves, [N, H, D] or batched [1, H, N, D], contiguous."""
        values = (x.to(self.dtype) for x in self.problem.values[i])
        if batched:
            values = (x.transpose(0, 1).unsqueeze(0).contiguous() for x in values)
        q, k, v, dout = (x.detach().clone() for x in values)
        for x in (q, k, v):
            x.requires_grad_(self.backward)
        return q, k, v, dout

    def run(
        self,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dout: Tensor,
    ) -> tuple[Tensor, ...]:
        """out, and with a backward dq, dk, dv: what is timed."""
        if not self.backward:
            with torch.no_grad():
                return (attend(q, k, v),)
        out = attend(q, k, v)
        return out, *torch.autograd.grad(out, (q, k, v), dout)

    def check(self, peer: str, result: tuple[Tensor, ...], inputs: int) -> str | None:
        expected = self.problem.expected(inputs, causal=peer == CAUSAL)
        tolerance = TOLERANCE[self.dtype]
        for name, x in zip(("out", "dq", "dk", "dv"), result, strict=False):
            rows = x.detach()[0].transpose(0, 1) if x.dim() == 4 else x.detach()
            heads = expected.kv_heads if name in ("dk", "dv") else expected.heads
            error = worst_row(rows[:, heads], getattr(expected, name))
            if not error <= tolerance:
                return f"{name} is off by {error:.1e} of a row, more than {tolerance:.0e}"
        return None

    def figures(self, peer: str, seconds: float) -> Row:
        causal = peer == CAUSAL
        pairs = self.causal_pairs if causal else self.layout.visible_pairs
        row: Row = {
            "tflops": self.operations(pairs) / seconds / 1e12,
            "checked_heads": self.problem.expected(0, causal).heads.tolist(),
        }
        if peer == OURS:
            row["backend"] = self.automatic
        return row

    @cached_property
    def automatic(self) -> str:
        q, k, v, _ = self.inputs(0)
        return choose_backend(q, k, v, self.layout)


def _ours(setup: AttentionSetup, backend: str | None) -> Callable[[int], Any]:
    inputs = [setup.inputs(i) for i in range(setup.input_sets)]
    if backend:
        if backend == setup.automatic:
            raise Skip("the automatic choice")
        q, k, v, _ = inputs[0]
        if reason := TRIE_ATTENTION[backend].why_not(q, k, v):
            raise Skip(reason)
        if backend == "triton" and setup.device == "cpu":
            raise Skip("runs in Triton's interpreter here, which is for tests")
        start, end = setup.layout.roots.astype(int).T
        squares = int(((end - start) ** 2).sum())
        setup.limit(squares if backend == "dense" else setup.layout.visible_pairs)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = trie_attention(q, k, v, setup.layout, backend=backend)
        assert isinstance(out, Tensor)
        return out

    return lambda i: setup.run(attend, *inputs[i])


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
    cpu = options.device == "cpu"
    heads = options.heads or (9 if cpu else 32)
    kv_heads = options.kv_heads or (9 if cpu else 8)
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise UsageError(f"--heads {heads} is not a multiple of --kv_heads {kv_heads}")
    for case in cases(options):
        for head_dim in options.head_dims or ([64] if cpu else [64, 128]):
            problem = Problem(case, options.device, heads, kv_heads, head_dim)
            for dtype in DTYPES[options.device]:
                for backward in (False, True):
                    yield AttentionSetup(problem, dtype, backward)


def relate(rows: list[Row]) -> None:
    by_peer = {row["peer"]: row for row in rows if row["status"] == "ok"}
    for row in by_peer.values():
        for column, peer in (("x_dense", DENSE), ("x_flex", FLEX)):
            row[column] = by_peer[peer]["ms"] / row["ms"] if peer in by_peer else None
        row["roofline"] = row["tflops"] / by_peer[CAUSAL]["tflops"] if CAUSAL in by_peer else None


SUITE = Suite(
    name="attention",
    options=AttentionOptions,
    setups=setups,
    peers=[
        Peer(OURS, functools.partial(_ours, backend=None), ours=True),
        *(
            Peer(f"{OURS}: {name}", functools.partial(_ours, backend=name), ours=True)
            for name in TRIE_ATTENTION
        ),
        *PEERS,
    ],
    relate=relate,
    columns={
        "backend": "backend",
        "tflops": "TFLOP/s",
        "x_dense": "x dense",
        "x_flex": "x flex",
        "roofline": "roofline",
    },
)

if __name__ == "__main__":
    if os.environ.get("TW_BACKEND"):
        raise SystemExit("bench.attention: unset TW_BACKEND: it would rename the automatic choice")
    raise SystemExit(main(SUITE))
