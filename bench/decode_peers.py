"""The peers of trie decode: padded and paged attention functions, and FlashInfer's cascade.

padded SDPA           transformers' own function for SDPA: keys and values of all sequences side
                      by side, padded on the left to the longest
varlen_attn           PyTorch's paged attention, each sequence by its own page table; its pages
                      hold 256 tokens
FlashInfer cascade    shared runs of pages read once for all sequences that have them, one level
                      of the tree of runs at a time; its plan is built outside `ms`, as ours is
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.attention import varlen
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from bench.availability import cuda_only, lacks, why_not_importable
from bench.decode_setup import PAGE_SIZE, DecodeSetup, Paging
from bench.suite import Peer, Skip

PADDED, VARLEN, CASCADE = "padded SDPA", "varlen_attn", "FlashInfer cascade"
VARLEN_PAGE_SIZE = 256  # FlashAttention-2, which varlen_attn calls, takes only multiples of this
MOST_PADDED_BYTES = {"cpu": 2 * 2**30, "cuda": 16 * 2**30}
CASCADE_WORKSPACE = 128 * 2**20  # bytes, as FlashInfer recommends


def _padded(setup: DecodeSetup) -> Callable[[int], Any]:
    p = setup.problem
    if p.window is not None:
        raise Skip("has no window")
    longest, count = max(p.lengths), len(p.nodes)
    size = setup.kv_bytes(longest * count) * setup.input_sets
    if size > MOST_PADDED_BYTES[setup.device]:
        raise Skip(f"{size / 2**30:.0f} GiB of padded keys and values")
    # As in transformers: no mask where nothing is padded.
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
    # The only attributes that the function reads of the model's attention layer.
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
    options: dict[str, Any] = {
        "block_table": block_table.to(setup.device),
        "seqused_k": torch.tensor(p.lengths, dtype=torch.int32, device=setup.device),
        "enable_gqa": True,
    }
    if p.window is not None:
        options["window_size"] = (p.window - 1, 0)
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
    """Sequences [first, end) that share a run of pages; the last page holds `last_len` tokens."""

    first: int
    end: int
    pages: list[int]
    last_len: int


def cascade(paging: Paging, lengths: list[int]) -> list[list[Group]]:
    """The levels of the tree of page runs, from the root.

    The groups of a level cover all sequences in order; sequences without a run on that level are in
    a group without pages. On the last level each sequence has a group of its own, of the pages that
    no other sequence shares.

    Sequences that share pages must be neighbours (see Problem.nodes), and none may share its last
    page.
    """
    tables, size = [table.tolist() for table in paging.tables], paging.page_size
    shared: list[list[Group]] = []
    own: list[Group] = []

    def descend(first: int, end: int, depth: int, level: int) -> None:
        """Adds sequences [first, end), whose pages before `depth` are on the levels above."""
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
    """The groups of a level, and groups without pages for the sequences between them."""
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
    if p.window is not None:
        raise Skip("has no window over all levels")
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


PEERS: list[Peer[DecodeSetup]] = [
    Peer(PADDED, _padded),
    Peer(VARLEN, _varlen, why_absent=_why_no_varlen),
    Peer(CASCADE, _cascade, why_absent=_why_no_cascade),
]
