"""Building a trie and its block schedule against Python dicts and FlexAttention's block mask:
`python -m bench.layout --help`. Host work, so a CPU only.

Every peer starts from the same Python lists, except the block mask, which starts from a given
`subtree_ends` (its computation is not timed).

    peak MB       high-water mark of the resident set over one call (bench/meter.py)
    bytes/token   bytes of what the peer returns, per trie token. A trie is O(N), so constant; a
                  schedule adds four bytes for each pair of blocks with a visible pair
    ns/unrolled token
                  time per token of all paths
    x dict, x block mask
                  how many times faster than the dict trie, than FlexAttention's block mask
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from bench import shapes
from bench.masks import FLEX_BLOCK, ancestor_mask_mod, block_mask, visible
from bench.running import suite_main
from bench.suite import Options, Peer, Row, Setup, Skip, Suite, UsageError
from tw_kernels import BlockSchedule, Trie

OURS, SCHEDULED = "ours: trie", "ours: trie + block schedule"
DICT, DICT_MASK, FLEX_MASK = "dict trie", "dict trie + N x N mask", "FlexAttention block mask"
BLOCK_Q, BLOCK_KV = 128, 64
MOST_MASK_BYTES = 2 * 2**30


class Flat(NamedTuple):
    """A trie as a peer returns it: tokens and positions int64, subtree_ends int32, all [N]."""

    tokens: Tensor
    positions: Tensor
    subtree_ends: Tensor


def dict_trie(paths: list[list[int]]) -> Flat:
    """A trie of nested dicts, one a token, flattened in preorder."""
    roots: dict[int, dict] = {}
    for path in paths:
        node = roots
        for token in path:
            child = node.get(token)
            if child is None:
                child = node[token] = {}
            node = child
    tokens, positions, subtree_ends = [], [], []
    # The stack holds (token, depth, children) of a node to visit, and (index, -1, children) of a
    # node whose subtree ends when it is popped.
    stack = [(token, 0, child) for token, child in reversed(roots.items())]
    while stack:
        token, depth, children = stack.pop()
        if depth < 0:
            subtree_ends[token] = len(tokens)
            continue
        index = len(tokens)
        tokens.append(token)
        positions.append(depth)
        if not children:
            subtree_ends.append(index + 1)
            continue
        subtree_ends.append(0)
        stack.append((index, -1, children))
        for following, child in reversed(children.items()):
            stack.append((following, depth + 1, child))
    return Flat(
        torch.tensor(tokens), torch.tensor(positions), torch.tensor(subtree_ends, dtype=torch.int32)
    )


def additive_mask(subtree_ends: Tensor) -> Tensor:
    """An additive attention mask, float32 [N, N]: 0 where visible, -inf elsewhere."""
    n = subtree_ends.numel()
    return torch.zeros(n, n).masked_fill_(~visible(subtree_ends), -torch.inf)


class LayoutSetup(Setup):
    """One case, and the independently computed results that peers must equal."""

    def __init__(self, case: shapes.Case):
        self.case = case
        self._bytes: dict[str, int] = {}  # of what each peer returns

    @property
    def key(self) -> Row:
        n, unrolled = len(self.case.trie), self.case.unrolled
        return {"case": self.case.name, "n": n, "unrolled": unrolled}

    @cached_property
    def expected(self) -> Flat:
        """Computed from the paths alone."""
        return dict_trie(self.case.paths)

    def figures(self, peer: str, seconds: float) -> Row:
        return {
            "ns_per_unrolled_token": seconds * 1e9 / self.case.unrolled,
            "bytes_per_token": self._bytes[peer] / len(self.case.trie),
        }

    def check(self, peer: str, result: Any, inputs: int) -> str | None:
        self._bytes[peer] = sum(t.numel() * t.element_size() for t in _tensors(result))
        parts = result if type(result) is tuple else (result,)
        return next((wrong for part in parts if (wrong := self._wrong(part))), None)

    def _wrong(self, part: Any) -> str | None:
        if isinstance(part, Trie | Flat):
            for name, expected in self.expected._asdict().items():
                if not torch.equal(getattr(part, name), expected):
                    return f"{name} differ"
            return None
        ends = self.expected.subtree_ends
        if isinstance(part, BlockSchedule):
            touched, full = _scheduled_blocks(part, len(ends))
            expected = _blocks(ends, BLOCK_Q, BLOCK_KV, rows_past_end_see_all=True)
        elif isinstance(part, BlockMask):
            touched, full = _block_mask_blocks(part)
            expected = _blocks(ends, FLEX_BLOCK, FLEX_BLOCK, rows_past_end_see_all=False)
        else:
            at = torch.arange(len(ends))
            for row, values in enumerate(part):
                if not torch.equal(values == 0, (at <= row) & (row < ends)):
                    return f"row {row} of the mask differs"
            return None
        if not torch.equal(touched, expected[0]):
            return "the blocks that hold a visible pair differ"
        return None if torch.equal(full, expected[1]) else "the full blocks differ"


def _tensors(result: Any) -> Iterator[Tensor]:
    """All tensors in a peer's result."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, tuple):
        for part in result:
            yield from _tensors(part)
    elif isinstance(result, Trie):
        yield from (t for t in vars(result).values() if isinstance(t, Tensor))
    elif isinstance(result, BlockMask):
        yield from (t for t in result.as_tuple() if isinstance(t, Tensor))


def _blocks(
    ends: Tensor, block_q: int, block_kv: int, rows_past_end_see_all: bool
) -> tuple[Tensor, Tensor]:
    """Which blocks hold a visible pair, and which hold only visible pairs: bool [nq, nkv] each.

    From the dense mask, one block of rows at a time. A column past the end is never visible.
    """
    n = len(ends)
    nq, nkv = -(-n // block_q), -(-n // block_kv)
    touched, full = torch.zeros(2, nq, nkv, dtype=torch.bool)
    at = torch.arange(n)
    for block in range(nq):
        rows = torch.arange(block * block_q, min((block + 1) * block_q, n))[:, None]
        visible = torch.zeros(block_q, nkv * block_kv, dtype=torch.bool)
        visible[: len(rows), :n] = (at <= rows) & (rows < ends)
        by_column = visible[: len(rows)].all(0) if rows_past_end_see_all else visible.all(0)
        touched[block] = visible.any(0).view(nkv, block_kv).any(1)
        full[block] = by_column.view(nkv, block_kv).all(1)
    return touched, full


def _scheduled_blocks(schedule: BlockSchedule, n: int) -> tuple[Tensor, Tensor]:
    touched, full = torch.zeros(2, len(schedule.full_end), -(-n // BLOCK_KV), dtype=torch.bool)
    starts = schedule.row_ptr.tolist()
    for block, full_end in enumerate(schedule.full_end.tolist()):
        full[block, schedule.kv_blocks[starts[block] : full_end].long()] = True
        touched[block, schedule.kv_blocks[starts[block] : starts[block + 1]].long()] = True
    return touched, full


def _block_mask_blocks(mask: BlockMask) -> tuple[Tensor, Tensor]:
    def dense(counts: Tensor | None, indices: Tensor | None) -> Tensor:
        assert counts is not None and indices is not None
        blocks = torch.zeros(indices.shape[-2:], dtype=torch.bool)
        for block, (count, row) in enumerate(
            zip(counts[0, 0].tolist(), indices[0, 0], strict=True)
        ):
            blocks[block, row[:count].long()] = True
        return blocks

    full = dense(mask.full_kv_num_blocks, mask.full_kv_indices)
    return dense(mask.kv_num_blocks, mask.kv_indices) | full, full


def _trie(setup: LayoutSetup) -> Callable[[int], Any]:
    paths = setup.case.paths
    return lambda _: Trie.from_paths(paths)


def _trie_and_schedule(setup: LayoutSetup) -> Callable[[int], Any]:
    paths = setup.case.paths

    def call(_: int) -> tuple[Trie, BlockSchedule]:
        trie = Trie.from_paths(paths)
        return trie, trie.layout().block_schedule(BLOCK_Q, BLOCK_KV)

    return call


def _dict_trie(setup: LayoutSetup) -> Callable[[int], Any]:
    paths = setup.case.paths
    return lambda _: dict_trie(paths)


def _dict_trie_and_mask(setup: LayoutSetup) -> Callable[[int], Any]:
    paths, n = setup.case.paths, len(setup.case.trie)
    if 4 * n * n > MOST_MASK_BYTES:
        raise Skip(f"its mask is {4e-9 * n * n:.1f} GB, over the limit of 2 GiB")

    def call(_: int) -> tuple[Flat, Tensor]:
        flat = dict_trie(paths)
        return flat, additive_mask(flat.subtree_ends)

    return call


def _flex_block_mask(setup: LayoutSetup) -> Callable[[int], Any]:
    ends = setup.case.trie.subtree_ends
    mask_mod = ancestor_mask_mod(ends)
    return lambda _: block_mask(mask_mod, len(ends), "cpu")


def setups(options: Options) -> Iterator[LayoutSetup]:
    if options.device != "cpu":
        raise UsageError("--device cuda: building a layout is host work; use --device cpu")
    sizes = ((100, 1), (512, 2), (2048, 3), (8192, 4), (13306, 5), (34408, 6))
    cases = [shapes.trajectory(*size) for size in (sizes[:3] if options.quick else sizes)]
    if options.quick:
        cases += [shapes.star(1024), shapes.pack(8, 64)]
    else:
        cases += [shapes.star(8192), shapes.pack(32, 128)]
        cases += [shapes.tree_of_thoughts("sorting128ToT", 1)]
        cases += [shapes.tree_of_thoughts("docmergeToT", 4)]
    yield from map(LayoutSetup, cases)


SUITE = Suite(
    name="layout",
    options=Options,
    setups=setups,
    peers=[
        Peer(OURS, _trie, ours=True),
        Peer(SCHEDULED, _trie_and_schedule, ours=True),
        Peer(DICT, _dict_trie),
        Peer(DICT_MASK, _dict_trie_and_mask),
        Peer(FLEX_MASK, _flex_block_mask),
    ],
    columns={
        "bytes_per_token": "bytes/token",
        "ns_per_unrolled_token": "ns/unrolled token",
    },
    versus={DICT: "x dict", FLEX_MASK: "x block mask"},
)

if __name__ == "__main__":
    raise SystemExit(suite_main(SUITE))
