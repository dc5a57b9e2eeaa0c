"""Random batches of sequences that share pages, and the definition of trie_decode in float64.

Batches are made on the host; the definition computes on the device of its inputs.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tw_kernels import DecodePlan, PagedKV


@dataclass
class Batch:
    """Page tables as an engine leaves them: forks share full pages and copy the partial last."""

    tables: list[list[int]]
    lengths: list[int]
    new_tokens: list[int]
    page_size: int
    num_pages: int

    @property
    def num_rows(self) -> int:
        return sum(self.new_tokens)

    def plan(self, **options: Any) -> DecodePlan:
        batch = self.tables, self.lengths, self.new_tokens, self.page_size
        return DecodePlan.build(*batch, **{"num_workers": 4, **options})

    def positions(self, s: int) -> range:
        """Positions of the new tokens of sequence s."""
        return range(self.lengths[s] - self.new_tokens[s], self.lengths[s])

    def slots(self, s: int) -> Tensor:
        """[length], page * page_size + offset of each token of sequence s."""
        p = torch.arange(self.lengths[s])
        return torch.tensor(self.tables[s])[p // self.page_size] * self.page_size + (
            p % self.page_size
        )


def random_batch(
    seed: int, sequences: int, page_size: int, longest: int, most_new: int = 1
) -> Batch:
    """Sequences forked from earlier ones at random tokens, or from none; some are then dropped.

    Each appends up to `longest` tokens and has up to `most_new` new ones: its own, and where no
    other sequence writes the page, shared ones too (a prompt prefilled beside its readers).
    """
    rng = np.random.default_rng(seed)
    pages = iter(rng.permutation(sequences * (2 + longest // page_size) + 8).tolist())
    tables: list[list[int]] = []
    lengths: list[int] = []
    for s in range(sequences):
        base = int(rng.integers(0, s + 1)) - 1  # -1: no parent
        kept = int(rng.integers(0, lengths[base] + 1)) if base >= 0 else 0
        length = kept + int(rng.integers(1, longest + 1))
        table = tables[base][: kept // page_size] if base >= 0 else []
        table = table + [next(pages) for _ in range(-(-length // page_size) - len(table))]
        tables.append(table)
        lengths.append(length)
    # Every live sequence writes a page of its own: its last.
    live = rng.permutation(sequences)[: int(rng.integers(sequences // 2, sequences)) + 1].tolist()
    tables, lengths = [tables[s] for s in live], [lengths[s] for s in live]
    written: set[int] = {table[-1] for table in tables}
    new_tokens = []
    for table, length in zip(tables, lengths, strict=True):
        new = int(rng.integers(1, min(most_new, length) + 1))
        first_page = (length - new) // page_size
        while first_page < len(table) - 1 and written & set(table[first_page:-1]):
            first_page += 1
        new = min(new, length - first_page * page_size)
        written |= set(table[first_page:])
        new_tokens.append(new)
    return Batch(tables, lengths, new_tokens, page_size, num_pages=1 + max(map(max, tables)))


def fork_join_batch(prefix: int, suffix: int, prompts: int, threads: int, page_size: int) -> Batch:
    """Rollouts' threads that decode one token each over a prefix of full pages."""
    pages = iter(range(10**9))
    tables, lengths = [], []
    for _ in range(prompts):
        shared = [next(pages) for _ in range(prefix // page_size)]
        for _ in range(threads):
            tables.append(shared + [next(pages) for _ in range(-(-suffix // page_size))])
            lengths.append(len(shared) * page_size + suffix)
    return Batch(tables, lengths, [1] * len(tables), page_size, num_pages=next(pages))


@dataclass
class Inputs:
    q: Tensor
    kv: PagedKV
    new_k: Tensor
    new_v: Tensor

    def to(self, device: str) -> "Inputs":
        """The same on a device, with pages of its own."""
        pages = PagedKV(*(x.clone().to(device) for x in (self.kv.k_pages, self.kv.v_pages)))
        rows = (x.to(device) for x in (self.q, self.new_k, self.new_v))
        return Inputs(next(rows), pages, *rows)

    def copy(self) -> "Inputs":
        """With pages of its own, since a call writes to them."""
        pages = PagedKV(self.kv.k_pages.clone(), self.kv.v_pages.clone())
        return Inputs(self.q, pages, self.new_k, self.new_v)

    def call(self) -> dict:
        return {"q": self.q, "kv": self.kv, "new_k": self.new_k, "new_v": self.new_v}


def random_inputs(
    batch: Batch, heads: tuple[int, int, int], dtype: torch.dtype, seed: int = 0
) -> Inputs:
    """heads: Hq, Hkv, D. Slots hold NaN unless a sequence of the batch has an old token there."""
    num_heads, num_kv_heads, head_dim = heads
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    k, v = torch.full((2, batch.num_pages * batch.page_size, num_kv_heads, head_dim), torch.nan)
    k, v = k.to(dtype), v.to(dtype)
    slots = [batch.slots(s) for s in range(len(batch.tables))]
    used = torch.cat(slots).unique()
    k[used], v[used] = randn(2, len(used), num_kv_heads, head_dim)
    for s, own in enumerate(slots):
        fresh = own[batch.lengths[s] - batch.new_tokens[s] :]
        k[fresh], v[fresh] = torch.nan, torch.nan
    shape = batch.num_pages, batch.page_size, num_kv_heads, head_dim
    return Inputs(
        randn(batch.num_rows, num_heads, head_dim),
        PagedKV(k.view(shape), v.view(shape)),
        randn(batch.num_rows, num_kv_heads, head_dim),
        randn(batch.num_rows, num_kv_heads, head_dim),
    )


def oracle(
    batch: Batch,
    inputs: Inputs,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """[Q, Hq, D] in float64: each new token over the tokens of its sequence up to itself."""
    device = inputs.q.device
    pages = [x.double().flatten(0, 1) for x in (inputs.kv.k_pages, inputs.kv.v_pages)]
    fresh = torch.cat([batch.slots(s)[-n:] for s, n in enumerate(batch.new_tokens)]).to(device)
    for x, new in zip(pages, (inputs.new_k, inputs.new_v), strict=True):
        x[fresh] = new.double()
    group = inputs.q.shape[1] // inputs.new_k.shape[1]
    outs, first = [], 0
    for s, new in enumerate(batch.new_tokens):
        q = inputs.q[first : first + new].double()
        slots = batch.slots(s).to(device)
        k, v = (x[slots].repeat_interleave(group, 1) for x in pages)
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        positions = torch.tensor(batch.positions(s), device=device)[:, None]
        keys = torch.arange(batch.lengths[s], device=device)
        hidden = keys > positions
        if window is not None:
            hidden |= keys <= positions - window
        weights = scores.masked_fill(hidden, -torch.inf)
        if sinks is not None:
            logits = sinks.double()[:, None, None].expand(-1, new, 1)
            weights = torch.cat([weights, logits], 2)
        weights = weights.softmax(-1)[:, :, : batch.lengths[s]]
        outs.append(torch.einsum("hqk,khd->qhd", weights, v))
        first += new
    return torch.cat(outs)
