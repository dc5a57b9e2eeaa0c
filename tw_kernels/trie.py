"""Token tries: many paths that share prefixes, every shared token stored and computed once.

A trie is kept flat, in preorder with children in first-seen order. `subtree_ends` then says all
there is to know about visibility: token j is i or an ancestor of i iff j <= i < subtree_ends[j]
(ARCHITECTURE, fact 1). A trie may have several roots; the same inequality separates them.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tw_kernels import _C

Path = Sequence[int] | np.ndarray | Tensor


@dataclass(eq=False)
class Trie:
    """A forest of token paths, flat. All tensors are 1-D and on the CPU.

    Attributes:
        tokens: int64 [N], token ids.
        positions: int64 [N], depth of each token: its position in every path through it.
        parents: int64 [N], flat index of the token before it on its path; -1 at a root.
        subtree_ends: int32 [N], one past the last token of its subtree.
        positive_weights, negative_weights: float32 [N], sums over the paths through a token of
            max(w, 0) and min(w, 0); zero if no weights were given. Kept apart because a clipped
            policy ratio treats them differently (SPEC, P-GRPO).
        path_ends: int32 [number of paths], flat index of the last token of each path.
    """

    tokens: Tensor
    positions: Tensor
    parents: Tensor
    subtree_ends: Tensor
    positive_weights: Tensor
    negative_weights: Tensor
    path_ends: Tensor

    @classmethod
    def from_paths(cls, paths: Sequence[Path], weights: Sequence | None = None) -> Trie:
        """Merges paths into a trie, in O(total tokens of the paths).

        Args:
            paths: at least one path; each a non-empty list, NumPy array or 1-D tensor of token ids
                in [0, 2^31).
            weights: for each path as many numbers as it has tokens.

        Raises:
            ValueError: no path, an empty path, an id out of range, more paths or tokens than an
                int32 counts, weights that do not fit; names the path and the token.
            TypeError: a path that is not a one-dimensional sequence of integers.
        """
        if any(isinstance(p, Tensor) for p in paths):
            paths = [_as_array(p) for p in paths]
        if weights is not None:
            weights = [_as_array(w) for w in weights]
        return cls(*(torch.from_numpy(a) for a in _C.build_trie(paths, weights)))

    @classmethod
    def pack(cls, tries: Sequence[Trie]) -> Trie:
        """Lays tries side by side as one forest; paths keep their order."""
        if not tries:
            raise ValueError("no tries: pack needs at least one")
        starts = np.cumsum([0, *(len(t) for t in tries)])
        if starts[-1] > torch.iinfo(torch.int32).max:
            raise ValueError(f"the pack would hold {starts[-1]} tokens: at most 2^31 - 1 fit")
        shifts = [int(s) for s in starts[:-1]]
        pairs = list(zip(tries, shifts, strict=True))
        return cls(
            tokens=torch.cat([t.tokens for t in tries]),
            positions=torch.cat([t.positions for t in tries]),
            parents=torch.cat([torch.where(t.parents < 0, -1, t.parents + s) for t, s in pairs]),
            subtree_ends=torch.cat([t.subtree_ends + s for t, s in pairs]),
            positive_weights=torch.cat([t.positive_weights for t in tries]),
            negative_weights=torch.cat([t.negative_weights for t in tries]),
            path_ends=torch.cat([t.path_ends + s for t, s in pairs]),
        )

    def __len__(self) -> int:
        return self.tokens.numel()

    @property
    def num_paths(self) -> int:
        return self.path_ends.numel()

    def path_nodes(self, i: int) -> Tensor:
        """Flat indices of path i from its root to its last token, int64 [length of path i]."""
        end = int(self.path_ends[i])
        parents, starts = self.parents.numpy(), self._node_starts
        runs = []
        while end >= 0:
            start = int(starts[np.searchsorted(starts, end, side="right") - 1])
            runs.append(np.arange(start, end + 1))
            end = int(parents[start])
        return torch.from_numpy(np.concatenate(runs[::-1]))

    @cached_property
    def _node_starts(self) -> np.ndarray:
        return _C.node_segments(self.subtree_ends.numpy()).reshape(-1, 3)[:, 0]

    def layout(self, device: torch.device | str = "cpu") -> TrieLayout:
        """The geometry that kernels read, on `device`."""
        return TrieLayout(self.subtree_ends.to(device))


def _as_array(values: Path) -> Path:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else values


class BlockSchedule(NamedTuple):
    """Which pairs of (block of query rows, block of KV columns) hold a visible pair.

    A pair is full iff every row sees every column, so that no mask is needed (fact 3). All tensors
    are int32, on the layout's device; nq and nkv are the numbers of blocks.
    """

    row_ptr: Tensor  # [nq + 1]: query block b meets kv_blocks[row_ptr[b]:row_ptr[b + 1]]
    full_end: Tensor  # [nq]: of those, kv_blocks[row_ptr[b]:full_end[b]] are full
    kv_blocks: Tensor  # [pairs], full part and partial part each ascending
    q_range: Tensor  # [nkv, 4]: KV block c meets query blocks [first, last), all of those in
    #                  [full_first, full_last) full; columns (first, full_first, full_last, last)
    q_order: Tensor  # [nq], query blocks, most KV blocks first
    kv_order: Tensor  # [nkv], KV blocks, most query blocks first


class TrieLayout:
    """What attention needs to know about a trie; everything follows from `subtree_ends`.

    Attributes:
        subtree_ends: int32 [N] on the device. The op receives this tensor alone and finds the
            layout, with its cached schedules, by its identity: see `TrieLayout.of`.
        visible_pairs: number of (query, key) pairs that attend.
        density: visible_pairs / N^2.
        memo: what backends derived from this trie and want to keep with it.
    """

    # Keyed by id(subtree_ends): a layout holds its tensor, so while it lives the id is not reused.
    _alive: ClassVar[weakref.WeakValueDictionary[int, TrieLayout]] = weakref.WeakValueDictionary()

    def __init__(self, subtree_ends: Tensor):
        self.subtree_ends = subtree_ends
        self._ends = np.ascontiguousarray(subtree_ends.detach().cpu().numpy())
        self.memo: dict[Hashable, Any] = {}
        self._alive[id(subtree_ends)] = self

    @classmethod
    def of(cls, subtree_ends: Tensor) -> TrieLayout:
        """The layout that owns this very tensor, or a new one if none does (a copy, say)."""
        return cls._alive.get(id(subtree_ends)) or cls(subtree_ends)

    @property
    def num_tokens(self) -> int:
        return self._ends.size

    @property
    def device(self) -> torch.device:
        return self.subtree_ends.device

    @cached_property
    def visible_pairs(self) -> int:
        return int(self._ends.sum(dtype=np.int64)) - self.num_tokens * (self.num_tokens - 1) // 2

    @property
    def density(self) -> float:
        return self.visible_pairs / self.num_tokens**2

    @cached_property
    def nodes(self) -> np.ndarray:
        """Node segments in preorder, int32 [M, 3]: start, end, subtree_end (fact 4).

        A segment is a maximal run in which every token is the only child of the one before it.
        """
        return _C.node_segments(self._ends).reshape(-1, 3)

    @cached_property
    def roots(self) -> np.ndarray:
        """Where the trees of the forest begin and end, int32 [R, 2]."""
        bounds = [0]
        while bounds[-1] < self.num_tokens:
            bounds.append(int(self._ends[bounds[-1]]))
        return np.stack([bounds[:-1], bounds[1:]], axis=1).astype(np.int32)

    def block_schedule(self, block_q: int, block_kv: int) -> BlockSchedule:
        """The schedule for these block sizes, built on the host in O(N + pairs), then kept."""
        key = "schedule", block_q, block_kv
        if key not in self.memo:
            arrays = _C.block_schedule(self._ends, block_q, block_kv)
            tensors = [torch.from_numpy(a).to(self.device, non_blocking=True) for a in arrays]
            tensors[3] = tensors[3].view(-1, 4)
            self.memo[key] = BlockSchedule(*tensors)
        return self.memo[key]
