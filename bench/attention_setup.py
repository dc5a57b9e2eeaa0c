"""The setup of bench.attention: inputs on one trie, the call that is timed, and the check.

Inputs are normally distributed and exact in bfloat16, so that one float64 reference
(bench/oracle.py) serves every dtype. Where the reference would take too long, it covers some of the
heads: `checked_heads`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench import shapes
from bench.oracle import TOLERANCE, Reference, reference, worst_row
from bench.roofline import Work
from bench.suite import Row, Setup, Skip
from tw_kernels import TrieLayout
from tw_kernels.attention.op import choose_backend

OURS = "ours"
FORWARD, BACKWARD = 4, 10  # operations for each visible pair, query head and element of a head
# What is timed: the forward pass, the backward pass of a forward pass made before, or both.
Pass = Literal["fwd", "bwd", "fwd+bwd"]
OPERATIONS = {"fwd": FORWARD, "bwd": BACKWARD, "fwd+bwd": FORWARD + BACKWARD}
# A call of more operations is skipped (about ten seconds), except our automatic choice.
MOST_OPERATIONS = {"cpu": 1e12, "cuda": float("inf")}
# Operations that the float64 reference of a case may take before it leaves out heads: seconds.
MOST_REFERENCE_OPERATIONS = {"cpu": 5e10, "cuda": 2e12}


def is_causal(peer: str) -> bool:
    """Whether a peer, by its name, computes plain causal attention of the same number of tokens."""
    return peer.endswith("causal")


def is_unrolled(peer: str) -> bool:
    """Whether a peer, by its name, computes every path as a sequence of its own."""
    return peer.startswith("unrolled")


class Problem:
    """One case at one set of head counts: the data that its dtypes and passes share.

    Args:
        window: a token sees itself and its last window - 1 ancestors; None: all of them.

    Attributes:
        memo: what peers and `expected` compute once and share, by a key of their own.
    """

    def __init__(
        self,
        case: shapes.Case,
        device: str,
        heads: int,
        kv_heads: int,
        head_dim: int,
        window: int | None = None,
    ):
        self.case, self.device, self.window = case, device, window
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.input_sets = 1 if device == "cpu" else 3
        self.memo: dict[Any, Any] = {}

    @cached_property
    def layout(self) -> TrieLayout:
        return self.case.trie.layout(self.device)

    @cached_property
    def starts(self) -> Tensor | None:
        """The first token that each token sees, int32 [N]; None without a window."""
        return None if self.window is None else self.layout.window_starts(self.window)

    @cached_property
    def visible_pairs(self) -> int:
        if self.window is None:
            return self.layout.visible_pairs
        return int((self.case.trie.positions + 1).clamp(max=self.window).sum())

    @cached_property
    def values(self) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """q [N, Hq, D], k, v [N, Hkv, D] and dout [N, Hq, D], bfloat16, per set of inputs."""
        n, d = self.layout.num_tokens, self.head_dim
        rng = torch.Generator(self.device).manual_seed(n)

        def normal(heads: int) -> Tensor:
            return torch.randn(n, heads, d, generator=rng, device=self.device).bfloat16()

        h, g = self.heads, self.kv_heads
        return [(normal(h), normal(g), normal(g), normal(h)) for _ in range(self.input_sets)]

    @cached_property
    def path_nodes(self) -> list[Tensor]:
        """The indices of the trie tokens on each path, int64 [length]."""
        return [self.case.trie.path_nodes(i).to(self.device) for i in range(len(self.case.paths))]

    @cached_property
    def unrolled_nodes(self) -> Tensor:
        """The trie token of every token of every path, path by path, int64 [T]."""
        return torch.cat(self.path_nodes)

    @cached_property
    def first_copies(self) -> Tensor:
        """Which of `unrolled_nodes` are the first copy of their token, bool [T, 1, 1]."""
        first = torch.zeros(len(self.unrolled_nodes), dtype=torch.bool)
        first[np.unique(self.unrolled_nodes.cpu(), return_index=True)[1]] = True
        return first.to(self.device)[:, None, None]

    @property
    def unrolled_pairs(self) -> int:
        """Visible pairs of all paths, each by itself."""
        lengths = [len(nodes) for nodes in self.path_nodes]
        beyond = [0 if self.window is None else max(0, n - self.window) for n in lengths]
        return sum(n * (n + 1) // 2 for n in lengths) - sum(n * (n + 1) // 2 for n in beyond)

    def expected(self, inputs: int, causal: bool) -> Reference:
        """The float64 results on a set of inputs, of trie attention or of causal attention."""
        key = "expected", inputs, causal
        if key not in self.memo:
            ends, starts, pairs = self.layout.subtree_ends, self.starts, self.visible_pairs
            if causal:
                n = ends.numel()
                ends, starts, pairs = torch.full_like(ends, n), None, n * (n + 1) // 2
            one = (FORWARD + BACKWARD) * pairs * self.head_dim * self.heads // self.kv_heads
            fit = int(MOST_REFERENCE_OPERATIONS[self.device] / one)
            count = min(max(1, fit), self.kv_heads)
            step = self.kv_heads // count
            # Always includes the last head, where wrong head indexing shows.
            chosen = list(range(self.kv_heads - 1, -1, -step))[:count][::-1]
            self.memo[key] = reference(*self.values[inputs], ends, chosen, starts)
        return self.memo[key]


class Inputs(NamedTuple):
    """q and dout [n, Hq, D], k and v [n, Hkv, D]; or batched, [1, H, n, D]."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor


class AttentionSetup(Setup):
    """One problem in one dtype and pass.

    Attributes:
        backward: whether gradients are computed.
    """

    def __init__(self, problem: Problem, dtype: torch.dtype, what: Pass):
        self.problem, self.dtype, self.what = problem, dtype, what
        self.backward = what != "fwd"
        self._outs: dict[Tensor, Tensor] = {}  # of the backward pass alone, by q
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
            "pass": self.what,
            "heads": p.heads,
            "kv_heads": p.kv_heads,
            "head_dim": p.head_dim,
        } | ({} if p.window is None else {"window": p.window})

    @property
    def layout(self) -> TrieLayout:
        return self.problem.layout

    @property
    def causal_pairs(self) -> int:
        """Visible pairs of causal attention of the same number of tokens."""
        return self.layout.num_tokens * (self.layout.num_tokens + 1) // 2

    def operations(self, pairs: int) -> int:
        """Floating-point operations of one call on so many visible pairs."""
        return OPERATIONS[self.what] * pairs * self.problem.heads * self.problem.head_dim

    def limit(self, pairs: int, also: str = "") -> None:
        """Raises Skip if a call on so many pairs takes too long; `also` is added to the reason."""
        operations, most = self.operations(pairs), MOST_OPERATIONS[self.device]
        if operations > most:
            why = f"{operations / 1e12:.1f} TFLOP a call, over the limit of {most / 1e12:.0f}"
            raise Skip(f"{why}; {also}" if also else why)

    def inputs(self, i: int) -> Inputs:
        """A set of inputs in the setup's dtype, [N, H, D]."""
        return self.leaves(x.to(self.dtype) for x in self.problem.values[i])

    def unrolled_inputs(self, i: int) -> Inputs:
        """The same of every token of every path, [T, H, D].

        dout is 0 except at the first copy of each token, so that the gradients of the copies add up
        to those of the trie.
        """
        nodes, first = self.problem.unrolled_nodes, self.problem.first_copies
        q, k, v, dout = (x.to(self.dtype)[nodes] for x in self.problem.values[i])
        return self.leaves((q, k, v, dout * first))

    def leaves(self, values: Iterable[Tensor], batched: bool = False) -> Inputs:
        """q, k, v and dout [n, H, D] as contiguous leaves; if `batched`, as [1, H, n, D]."""
        if batched:
            values = (x.transpose(0, 1).unsqueeze(0) for x in values)
        q, k, v, dout = (x.detach().clone(memory_format=torch.contiguous_format) for x in values)
        for x in (q, k, v):
            x.requires_grad_(self.backward)
        return Inputs(q, k, v, dout)

    def run(
        self,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dout: Tensor,
    ) -> tuple[Tensor, ...]:
        """The timed call: returns (out,), or (out, dq, dk, dv) with a backward pass.

        Of the backward pass alone the first call makes the forward pass, too, for all others.
        """
        if not self.backward:
            with torch.no_grad():
                return (attend(q, k, v),)
        if self.what == "fwd+bwd":
            out = attend(q, k, v)
            return out, *torch.autograd.grad(out, (q, k, v), dout)
        if q not in self._outs:
            self._outs[q] = attend(q, k, v)
        out = self._outs[q]
        return out.detach(), *torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)

    def check(
        self, peer: str, result: tuple[Tensor, ...] | list[tuple[Tensor, ...]], inputs: int
    ) -> str | None:
        """Checks a result of `run`, or a list of them, one a path."""
        expected = self.problem.expected(inputs, causal=is_causal(peer))
        tolerance = TOLERANCE[self.dtype]
        if isinstance(result, list):
            result = tuple(torch.cat([_rows(x) for x in xs]) for xs in zip(*result, strict=True))
        for name, x in zip(("out", "dq", "dk", "dv"), result, strict=False):
            heads = expected.kv_heads if name in ("dk", "dv") else expected.heads
            rows, wanted = _rows(x)[:, heads], getattr(expected, name)
            if is_unrolled(peer):
                nodes = self.problem.unrolled_nodes
                if name == "out":
                    wanted = wanted[nodes]
                else:
                    rows = torch.zeros_like(wanted).index_add_(0, nodes, rows.double())
            error = worst_row(rows, wanted)
            if not error <= tolerance:
                return f"{name} is off by {error:.1e} of a row, more than {tolerance:.0e}"
        return None

    def work(self, peer: str) -> Work:
        p = self.problem
        pairs = self.causal_pairs if is_causal(peer) else p.visible_pairs
        numbers = 2 * (p.heads + p.kv_heads) * p.head_dim * self.layout.num_tokens
        passes = 2 if self.backward else 1
        dtype = self.key["dtype"]
        return Work(self.operations(pairs), passes * numbers * self.dtype.itemsize, dtype)

    def figures(self, peer: str, seconds: float) -> Row:
        heads = self.problem.expected(0, is_causal(peer)).heads.tolist()
        return {"checked_heads": heads} | ({"backend": self.automatic} if peer == OURS else {})

    @cached_property
    def automatic(self) -> str:
        """The backend that runs where none is named."""
        q, k, v, _ = self.inputs(0)
        return choose_backend(q, k, v, self.layout, window=self.problem.window)


def _rows(x: Tensor) -> Tensor:
    """[n, H, D] of [n, H, D] or [1, H, n, D]."""
    return x.detach()[0].transpose(0, 1) if x.dim() == 4 else x.detach()
