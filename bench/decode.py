"""One decode step of one layer, all live sequences at once: `python -m bench.decode --help`.

Each row times one implementation on one set of live sequences, one new token each. Keys and values
lie in pages of 16 tokens, placed at random as in a pool that has been in use for a while; sequences
that were forked from one another share their full pages. Our rows write the new keys and values,
for the others they are there already.

    ours                  the plan with sharing: each run of pages is read once for all its readers
    ours: <backend>       the same by a backend that is not the automatic choice
    ours, sharing off     the same kernel, every sequence alone
    padded SDPA           as transformers runs it (its own function): keys and values of every
                          sequence side by side, padded on the left to the longest
    varlen_attn           PyTorch's paged attention, each sequence by its own page table; its pages
                          hold 256 tokens
    FlashInfer cascade    shared runs of pages once for all their readers, a level of the tree of
                          runs at a time; plan outside `ms`, as ours

    sharing     tokens of all sequences / tokens of their trie: what sharing could save at best
    plan us     building our plan on the host. Not in `ms`: all layers of a step use one plan
    TFLOP/s     of 4 D Hq operations a visible pair, over the time
    GB/s        keys and values of the trie's tokens, queries and results, each once, over the time
    x off, x padded, x varlen, x cascade   how many times faster than those peers
    memory      tokens that the allocated pages have room for / tokens of the trie
"""

from __future__ import annotations

import functools
import importlib
import itertools
import os
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from time import perf_counter
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import varlen
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from bench import shapes
from bench.frame import Options, Peer, Row, Setup, Skip, Suite, UsageError, main
from bench.oracle import worst_row
from bench.peers import cuda_only, lacks, why_not_importable
from bench.roofline import Work
from tw_kernels import DecodePlan, PagedKV, trie_decode
from tw_kernels.decode.op import TRIE_DECODE, choose_backend

OURS, UNSHARED = "ours", "ours, sharing off"
PADDED, VARLEN, CASCADE = "padded SDPA", "varlen_attn", "FlashInfer cascade"
# Each by itself; the reference is for tests.
BACKENDS = {f"{OURS}: {name}": name for name in TRIE_DECODE if name != "reference"}
PAGE_SIZE = 16
VARLEN_PAGE_SIZE = 256  # FlashAttention-2, which is behind it, takes multiples of this only
DTYPES = (torch.float32, torch.bfloat16)
# As in bench/oracle.py, but tighter: there are no gradients, and one wrong key among a thousand
# moves a row by less.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
MOST_PADDED_BYTES = {"cpu": 2 * 2**30, "cuda": 16 * 2**30}
PLAN_REPEATS = 20
CASCADE_WORKSPACE = 128 * 2**20  # bytes, as FlashInfer recommends
THREADS = (1, 2, 4, 8, 16)  # of one rollout: how time grows with them


@dataclass
class DecodeOptions(Options):
    """Options of bench.decode, beside those of every benchmark.

    Args:
        heads, kv_heads, head_dim: query heads, key-value heads and head dim. Default: 9, 3 and 64,
            on CUDA also 32, 8 and 128.
    """

    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None


class Paging(NamedTuple):
    """Where the sequences' tokens lie: int32 page ids of each sequence."""

    page_size: int
    tables: list[np.ndarray]
    num_pages: int


class Problem:
    """The live sequences of one case, and what they hold: what its dtypes share."""

    def __init__(self, case: shapes.Case, device: str, heads: tuple[int, int, int]):
        self.case, self.device = case, device
        self.heads, self.kv_heads, self.head_dim = heads
        # More than one layer: what a call leaves in the cache is not what the next one reads.
        self.input_sets = 2 if device == "cpu" else 3

    @cached_property
    def nodes(self) -> list[Tensor]:
        """The trie's tokens on the path of each sequence; its last one is the new token. By
        lineage, as an engine numbers them: sequences that share tokens are neighbours."""
        trie = self.case.trie
        return [trie.path_nodes(int(i)) for i in trie.path_ends.argsort()]

    @cached_property
    def lengths(self) -> list[int]:
        return [len(nodes) for nodes in self.nodes]

    def paging(self, page_size: int) -> Paging:
        """A page is known by the last token in it: sequences share full pages of equal tokens, and
        each has a last page of its own."""
        ends = []
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
        """[S, Hq, D] in float64 for each set of inputs: from the definition, without pages."""
        group = self.heads // self.kv_heads
        outs = []
        for q, k, v in self.values:
            rows = q.double().unflatten(1, (self.kv_heads, group))
            out = torch.empty_like(rows)
            for s, nodes in enumerate(self.nodes):
                at = nodes.to(self.device)
                ks, vs = (x[at].double().transpose(0, 1) for x in (k, v))  # [Hkv, length, D]
                p = (rows[s] @ ks.mT * self.head_dim**-0.5).softmax(-1)
                out[s] = p @ vs
            outs.append(out.flatten(1, 2))
        return outs


class DecodeSetup(Setup):
    """One problem in one dtype."""

    def __init__(self, problem: Problem, dtype: torch.dtype):
        self.problem, self.dtype = problem, dtype
        self.device, self.input_sets = problem.device, problem.input_sets
        self.plan_seconds: dict[str, float] = {}

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
        }

    def kv_bytes(self, tokens: int) -> int:
        return 2 * tokens * self.problem.kv_heads * self.problem.head_dim * self.dtype.itemsize

    def inputs(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (x.to(self.dtype) for x in self.problem.values[i])
        return q, k, v

    def pages(self, paging: Paging, k: Tensor, v: Tensor, new: bool) -> PagedKV:
        """Pages that hold the keys and values [trie tokens, Hkv, D] of the sequences, their last
        tokens only if `new`; 0 elsewhere."""
        p, size = self.problem, paging.page_size
        shape = paging.num_pages, size, p.kv_heads, p.head_dim
        k_pages, v_pages = torch.zeros(2, *shape, dtype=self.dtype, device=self.device)
        for table, nodes in zip(paging.tables, p.nodes, strict=True):
            old = torch.arange(len(nodes) if new else len(nodes) - 1)
            slots = torch.from_numpy(table).long()[old // size] * size + old % size
            at, nodes = slots.to(self.device), nodes[old].to(self.device)
            k_pages.flatten(0, 1)[at], v_pages.flatten(0, 1)[at] = k[nodes], v[nodes]
        return PagedKV(k_pages, v_pages)

    def plan(self, peer: str, paging: Paging, share: bool) -> DecodePlan:
        """A plan; how long it takes goes into the figures of the peer."""
        p = self.problem
        step = paging.tables, p.lengths, [1] * len(p.nodes), paging.page_size, self.device
        samples = []
        for _ in range(PLAN_REPEATS):
            start = perf_counter()
            DecodePlan.build(*step, share=share)
            samples.append(perf_counter() - start)
        self.plan_seconds[peer] = statistics.median(samples)
        return DecodePlan.build(*step, share=share)

    def check(self, peer: str, result: Tensor, inputs: int) -> str | None:
        error, tolerance = worst_row(result, self.problem.expected[inputs]), TOLERANCE[self.dtype]
        if error <= tolerance:
            return None
        return f"out is off by {error:.1e} of a row, more than {tolerance:.0e}"

    @property
    def sample(self) -> tuple[Tensor, PagedKV]:
        """Queries, and keys and values in pages, by which backends are chosen."""
        p = self.problem
        q = torch.empty(1, p.heads, p.head_dim, dtype=self.dtype, device=self.device)
        pages = q.new_empty(1, PAGE_SIZE, p.kv_heads, p.head_dim)
        return q, PagedKV(pages, pages)

    @property
    def automatic(self) -> str:
        return choose_backend(*self.sample)

    def work(self, peer: str) -> Work:
        """A sequence's one query sees all its tokens."""
        p = self.problem
        rows = 2 * len(p.nodes) * p.heads * p.head_dim * self.dtype.itemsize  # of q and out
        dtype = self.key["dtype"]
        pairs = p.case.unrolled
        flops = 4 * pairs * p.heads * p.head_dim
        return Work(flops, self.kv_bytes(len(p.case.trie)) + rows, dtype)

    def figures(self, peer: str, seconds: float) -> Row:
        p = self.problem
        row: Row = {
            "unique_kv_bytes": self.kv_bytes(len(p.case.trie)),
            "unshared_kv_bytes": self.kv_bytes(p.case.unrolled),
        }
        if peer in self.plan_seconds:
            row["backend"] = BACKENDS.get(peer) or self.automatic
            row["plan_us"] = self.plan_seconds[peer] * 1e6
            row["kv_memory"] = p.paging(PAGE_SIZE).num_pages * PAGE_SIZE / len(p.case.trie)
        return row


def _ours(
    setup: DecodeSetup, peer: str, share: bool, backend: str | None = None
) -> Callable[[int], Any]:
    if backend:
        if backend == setup.automatic:
            raise Skip("the automatic choice")
        if reason := TRIE_DECODE[backend].why_not(*setup.sample):
            raise Skip(reason)
    paging = setup.problem.paging(PAGE_SIZE)
    plan = setup.plan(peer, paging, share)
    last = torch.stack([nodes[-1] for nodes in setup.problem.nodes]).to(setup.device)
    calls = []
    for i in range(setup.input_sets):
        q, k, v = setup.inputs(i)
        calls.append((q, setup.pages(paging, k, v, new=False), k[last], v[last]))

    def call(i: int) -> Tensor:
        q, kv, new_k, new_v = calls[i]
        return trie_decode(q, kv, plan, backend=backend, new_k=new_k, new_v=new_v)

    return call


def _why_no_backend(name: str, device: str) -> str | None:
    if name == "triton" and device == "cpu":
        return "runs in Triton's interpreter on a CPU, which is for tests"
    q = torch.empty(1, 1, 64, dtype=torch.bfloat16, device=device)
    pages = q.new_empty(1, PAGE_SIZE, 1, 64)
    return TRIE_DECODE[name].why_not(q, PagedKV(pages, pages))


def _padded(setup: DecodeSetup) -> Callable[[int], Any]:
    p = setup.problem
    longest, count = max(p.lengths), len(p.nodes)
    size = setup.kv_bytes(longest * count) * setup.input_sets
    if size > MOST_PADDED_BYTES[setup.device]:
        raise Skip(f"{size / 2**30:.0f} GiB of padded keys and values")
    # As transformers: no mask where nothing is padded.
    mask = None
    if min(p.lengths) < longest:
        at = torch.arange(longest, device=setup.device)
        padding = longest - torch.tensor(p.lengths, device=setup.device)
        mask = (at >= padding[:, None])[:, None, None]
    calls = []
    for i in range(setup.input_sets):
        q, k, v = setup.inputs(i)
        shape = count, p.kv_heads, longest, p.head_dim
        k_padded, v_padded = torch.zeros(2, *shape, dtype=setup.dtype, device=setup.device)
        for s, nodes in enumerate(p.nodes):
            at = nodes.to(setup.device)
            for padded, x in ((k_padded, k), (v_padded, v)):
                padded[s, :, longest - len(nodes) :] = x[at].transpose(0, 1)
        calls.append((q[:, :, None], k_padded, v_padded))
    # All that the function looks at in the model's attention layer.
    layer = SimpleNamespace(num_key_value_groups=p.heads // p.kv_heads, is_causal=True)

    @torch.no_grad()
    def call(i: int) -> Tensor:
        q, k, v = calls[i]
        scaling = p.head_dim**-0.5
        out, _ = sdpa_attention_forward(cast(Any, layer), q, k, v, mask, scaling=scaling)
        return out[:, 0]

    return call


def _varlen(setup: DecodeSetup) -> Callable[[int], Any]:
    p = setup.problem
    if setup.dtype == torch.float32:
        raise Skip("takes half precision only")
    count, longest, paging = len(p.nodes), max(p.lengths), p.paging(VARLEN_PAGE_SIZE)
    block_table = torch.zeros(count, max(map(len, paging.tables)), dtype=torch.int32)
    for row, table in zip(block_table, paging.tables, strict=True):
        row[: len(table)] = torch.from_numpy(table)
    starts = torch.arange(count + 1, dtype=torch.int32, device=setup.device)
    options = {
        "block_table": block_table.to(setup.device),
        "seqused_k": torch.tensor(p.lengths, dtype=torch.int32, device=setup.device),
        "enable_gqa": True,
    }
    inputs = [setup.inputs(i) for i in range(setup.input_sets)]
    calls = [(q, setup.pages(paging, k, v, new=True)) for q, k, v in inputs]

    @torch.no_grad()
    def call(i: int) -> Any:
        q, kv = calls[i]
        sizes = starts, None, 1, longest
        return varlen.varlen_attn(q, kv.k_pages, kv.v_pages, *sizes, **options)

    return call


def _why_no_varlen(device: str) -> str | None:
    return cuda_only(device) or lacks(varlen.varlen_attn, "block_table", "enable_gqa")


class Group(NamedTuple):
    """Sequences [first, end) that all read one run of pages, of which the last holds last_len."""

    first: int
    end: int
    pages: list[int]
    last_len: int


def cascade(paging: Paging, lengths: list[int]) -> list[list[Group]]:
    """The levels of the tree of page runs, from the root. Each level's groups cover all sequences,
    in order; on the last one each sequence reads by itself what it shares with nobody, and on the
    others the group of those that have no run there has no pages.

    Sequences that share pages are neighbours (Problem.nodes), and none shares its last page.
    """
    tables, size = [table.tolist() for table in paging.tables], paging.page_size
    shared: list[list[Group]] = []
    own: list[Group] = []

    def descend(first: int, end: int, depth: int, level: int) -> None:
        """Sequences [first, end), whose pages before `depth` are on the levels above."""
        if end - first == 1:
            own.append(Group(first, end, tables[first][depth:], (lengths[first] - 1) % size + 1))
            return
        columns = zip(*(table[depth:] for table in tables[first:end]), strict=False)
        run = sum(1 for _ in itertools.takewhile(lambda pages: len(set(pages)) == 1, columns))
        if run:
            if level == len(shared):
                shared.append([])
            shared[level].append(Group(first, end, tables[first][depth : depth + run], size))
        for _, part in itertools.groupby(range(first, end), lambda s: tables[s][depth + run]):
            members = list(part)
            descend(members[0], members[-1] + 1, depth + run, level + (run > 0))

    descend(0, len(tables), 0, 0)
    return [*(_filled(groups, len(tables)) for groups in shared), own]


def _filled(groups: list[Group], count: int) -> list[Group]:
    """With groups without pages in the gaps."""
    ends = [0, *(group.end for group in groups)]
    firsts = [*(group.first for group in groups), count]
    gaps = [Group(*gap, [], 0) for gap in zip(ends, firsts, strict=True) if gap[0] < gap[1]]
    return sorted(groups + gaps)


def _why_no_cascade(device: str) -> str | None:
    name = "MultiLevelCascadeAttentionWrapper"
    return cuda_only(device) or why_not_importable("flashinfer", name, "flashinfer-python")


def _cascade(setup: DecodeSetup) -> Callable[[int], Any]:
    p = setup.problem
    if setup.dtype == torch.float32:
        raise Skip("takes half precision only")
    wrapper_type = importlib.import_module("flashinfer").MultiLevelCascadeAttentionWrapper
    paging = p.paging(PAGE_SIZE)
    levels = cascade(paging, p.lengths)

    def int32(values: Iterable[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int32, device=setup.device)

    workspace = torch.empty(CASCADE_WORKSPACE, dtype=torch.uint8, device=setup.device)
    wrapper = wrapper_type(len(levels), workspace, "NHD")
    wrapper.plan(
        [int32([0, *(g.end for g in groups)]) for groups in levels],
        [int32(itertools.accumulate((len(g.pages) for g in gs), initial=0)) for gs in levels],
        [int32(page for g in groups for page in g.pages) for groups in levels],
        [int32(g.last_len for g in groups) for groups in levels],
        *(p.heads, p.kv_heads, p.head_dim, PAGE_SIZE),
        q_data_type=setup.dtype,
        kv_data_type=setup.dtype,
    )
    inputs = [setup.inputs(i) for i in range(setup.input_sets)]
    calls = [(q, setup.pages(paging, k, v, new=True)) for q, k, v in inputs]

    def call(i: int) -> Any:
        q, kv = calls[i]
        return wrapper.run(q, (kv.k_pages, kv.v_pages))

    return call


def cases(options: Options) -> list[shapes.Case]:
    fork, tree = shapes.fork, shapes.tree_of_thoughts
    if options.quick:
        return [fork(2, 4, 512, 64), tree("sorting128ToT", 17)]
    if options.device == "cuda":
        return [
            *(fork(1, threads, 8192, 128) for threads in THREADS),
            *(fork(rollouts, 8, 8192, 128) for rollouts in (4, 16)),
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
    sizes = [(heads, kv_heads, head_dim)]
    if options.device == "cuda" and not (options.heads or options.kv_heads or options.head_dim):
        sizes.append((32, 8, 128))
    for case in cases(options):
        for size in sizes:
            problem = Problem(case, options.device, size)
            for dtype in DTYPES:
                yield DecodeSetup(problem, dtype)


SUITE = Suite(
    name="decode",
    options=DecodeOptions,
    setups=setups,
    peers=[
        Peer(OURS, lambda setup: _ours(setup, OURS, share=True), ours=True),
        *(
            Peer(
                peer,
                functools.partial(_ours, peer=peer, share=True, backend=name),
                ours=True,
                why_absent=functools.partial(_why_no_backend, name),
            )
            for peer, name in BACKENDS.items()
        ),
        Peer(UNSHARED, lambda setup: _ours(setup, UNSHARED, share=False), ours=True),
        Peer(PADDED, _padded),
        Peer(VARLEN, _varlen, why_absent=_why_no_varlen),
        Peer(CASCADE, _cascade, why_absent=_why_no_cascade),
    ],
    columns={"backend": "backend", "plan_us": "plan us", "kv_memory": "memory"},
    versus={UNSHARED: "x off", PADDED: "x padded", VARLEN: "x varlen", CASCADE: "x cascade"},
)

if __name__ == "__main__":
    raise SystemExit(main(SUITE))
