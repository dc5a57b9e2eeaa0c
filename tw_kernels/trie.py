"""Token tries: many paths that share prefixes, every shared token stored and computed once.

A trie is kept flat, in preorder with children in first-seen order. `subtree_ends` then says all
there is to know about visibility: token j is i or an ancestor of i iff j <= i < subtree_ends[j]
(docs/architecture.md, fact 1). A trie may have several roots; the same inequality separates them.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tw_kernels import _C

Path = Sequence[int] | np.ndarray | Tensor
INT32_MAX = 2**31 - 1


@dataclass(eq=False)
class Trie:
    """A forest of token paths, flat. All tensors are 1-D and on the CPU.

    Attributes:
        tokens: int64 [N], token ids.
        positions: int64 [N], depth of each token: its position in every path through it.
        parents: int64 [N], flat index of the token before it on its path; -1 at a root.
        subtree_ends: int32 [N], one past the last token of its subtree.
        path_ends: int32 [number of paths], flat index of the last token of each path.
        columns: by name, float32 [N] each: sums over the paths through a token.
    """

    tokens: Tensor
    positions: Tensor
    parents: Tensor
    subtree_ends: Tensor
    path_ends: Tensor
    columns: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def from_paths(cls, paths: Sequence[Path], weights: Sequence | None = None) -> Trie:
        """Merges paths into a trie, in O(total tokens of the paths).

        Args:
            paths: at least one path; each a non-empty list, NumPy array or 1-D tensor of token ids
                in [0, 2^31).
            weights: for each path as many numbers as it has tokens; they become the column
                "weights". More columns: `TrieBuilder`.

        Raises:
            ValueError: no path, an empty path, an id out of range, more paths or tokens than an
                int32 counts, weights that do not fit; names the path and the token.
            TypeError: a path that is not a one-dimensional sequence of integers.
        """
        if len(paths) > INT32_MAX:
            raise ValueError(f"{len(paths)} paths: at most 2^31 - 1 fit in a trie")
        if weights is not None and len(weights) != len(paths):
            raise ValueError(
                f"{len(weights)} weight lists for {len(paths)} paths: give one per path"
            )
        builder = TrieBuilder() if weights is None else TrieBuilder("weights")
        builder._add(paths, [] if weights is None else [weights])
        return builder.build()

    @classmethod
    def pack(cls, tries: Sequence[Trie]) -> Trie:
        """Lays tries side by side as one forest; paths keep their order.

        Raises:
            ValueError: no trie, more tokens than an int32 counts, or columns of different names.
        """
        if not tries:
            raise ValueError("no tries: pack needs at least one")
        starts = np.cumsum([0, *(len(t) for t in tries)])
        if starts[-1] > INT32_MAX:
            raise ValueError(f"the pack would hold {starts[-1]} tokens: at most 2^31 - 1 fit")
        names = tries[0].columns.keys()
        for i, trie in enumerate(tries):
            if trie.columns.keys() != names:
                raise ValueError(f"trie {i} has the columns {[*trie.columns]}, trie 0 {[*names]}")
        shifts = [int(s) for s in starts[:-1]]
        pairs = list(zip(tries, shifts, strict=True))
        return cls(
            tokens=torch.cat([t.tokens for t in tries]),
            positions=torch.cat([t.positions for t in tries]),
            parents=torch.cat([torch.where(t.parents < 0, -1, t.parents + s) for t, s in pairs]),
            subtree_ends=torch.cat([t.subtree_ends + s for t, s in pairs]),
            path_ends=torch.cat([t.path_ends + s for t, s in pairs]),
            columns={name: torch.cat([t.columns[name] for t in tries]) for name in names},
        )

    def __len__(self) -> int:
        return self.tokens.numel()

    @property
    def num_paths(self) -> int:
        """How many paths the trie was built from, equal ones counted each time."""
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


class TrieBuilder:
    """Builds a trie path by path, and says as it grows how large it is.

    Args:
        columns: names of the numbers that each path brings for its tokens.
    """

    def __init__(self, *columns: str):
        self._names = columns
        self._trie = _C.TrieBuilder(columns)

    @property
    def num_tokens(self) -> int:
        """Size of the trie of the paths so far."""
        return self._trie.num_tokens

    def shared_prefix(self, path: Path) -> int:
        """How many of the path's leading tokens the trie already holds.

        Adding it would thus make the trie larger by len(path) - shared_prefix(path) tokens.

        Raises:
            ValueError, TypeError: as `add`.
        """
        [path] = _as_arrays([path])
        return self._trie.shared_prefix(path)

    def add(self, path: Path, **columns: Any) -> None:
        """Adds a path: a non-empty list, NumPy array or 1-D tensor of token ids in [0, 2^31).

        Args:
            columns: for every column of the builder as many numbers as the path has tokens. A
                column of the trie holds for each token their sum over the paths through it, added
                up in float32 in the order of the paths.

        Raises:
            ValueError: an empty path, an id out of range, too many tokens for an int32, or columns
                that do not fit; names the path by its number, and the token.
            TypeError: a path that is not a one-dimensional sequence of integers.
        """
        if columns.keys() != set(self._names):
            raise ValueError(f"a path needs the columns {[*self._names]}, got {[*columns]}")
        self._add([path], [[columns[name]] for name in self._names])

    def _add(self, paths: Sequence[Path], columns: Sequence[Sequence]) -> None:
        """Adds many paths; columns, in the order of their names, have a row for each."""
        self._trie.add(_as_arrays(paths), [_as_arrays(column) for column in columns])

    def build(self) -> Trie:
        """The trie of all paths so far.

        Raises:
            ValueError: no path was added.
        """
        *arrays, columns = self._trie.build()
        return Trie(
            *map(torch.from_numpy, arrays),
            columns=dict(zip(self._names, map(torch.from_numpy, columns), strict=True)),
        )


def _as_arrays(rows: Sequence) -> Sequence:
    """The same rows, a tensor as an array."""
    if any(isinstance(row, Tensor) for row in rows):
        return [r.detach().cpu().numpy() if isinstance(r, Tensor) else r for r in rows]
    return rows


class BlockSchedule(NamedTuple):
    """Which pairs of (block of query rows, block of KV columns) hold a visible pair.

    A pair is full iff every row sees every column, so that no mask is needed (docs/architecture.md,
    fact 3). All tensors are int32, on the layout's device; nq and nkv are the numbers of blocks.

    Where a window leaves gaps among the query blocks of a KV block, q_range bounds them, and
    q_starts says which they are: those whose least start is above the last column see nothing of
    it, and of [full_first, full_last) those whose greatest start is above the first column are not
    full.
    """

    row_ptr: Tensor  # [nq + 1]: query block b meets kv_blocks[row_ptr[b]:row_ptr[b + 1]]
    full_end: Tensor  # [nq]: of those, kv_blocks[row_ptr[b]:full_end[b]] are full
    kv_blocks: Tensor  # [pairs], full part and partial part each ascending
    q_range: Tensor  # [nkv, 4]: KV block c meets query blocks [first, last), all of those in
    #                  [full_first, full_last) full; columns (first, full_first, full_last, last)
    q_order: Tensor  # [nq], query blocks, most KV blocks first
    kv_order: Tensor  # [nkv], KV blocks, most query blocks first
    q_starts: Tensor | None  # [nq, 2], least and greatest of a query block's window_starts; None
    #                          without a window


class TrieLayout:
    """What attention needs to know about a trie; everything follows from `subtree_ends`.

    Attributes:
        subtree_ends: int32 [N] on the device, contiguous; not to be changed.
        longest_path: number of tokens on the longest path.
        memo: what backends derived from this trie and want to keep with it.
    """

    # An op of torch.library takes tensors, numbers and strings. Any other object needs
    # torch._library.opaque_object, which is private and differs between releases of torch. So
    # trie_attention's op receives subtree_ends, and finds the layout, with what it keeps, by the
    # identity of that tensor: a layout holds its tensor, so while it lives the id is not reused.
    _alive: ClassVar[weakref.WeakValueDictionary[int, TrieLayout]] = weakref.WeakValueDictionary()

    def __init__(self, subtree_ends: Tensor):
        """Reads and checks the ends on the host, in O(N).

        Raises:
            ValueError: no int32 [N] with N at least 1, or not the ends of a forest in preorder;
                names the token.
        """
        if subtree_ends.dtype != torch.int32 or subtree_ends.dim() != 1 or not len(subtree_ends):
            raise ValueError(
                "subtree_ends must be int32 [N], N at least 1; "
                f"got {subtree_ends.dtype} {list(subtree_ends.shape)}"
            )
        self.subtree_ends = subtree_ends.contiguous()
        self._ends = self.subtree_ends.cpu().numpy()
        self.longest_path = _C.longest_path(self._ends)
        self.memo: dict[Hashable, Any] = {}
        self._alive[id(self.subtree_ends)] = self

    @classmethod
    def of(cls, subtree_ends: Tensor) -> TrieLayout:
        """The layout that owns this very tensor, or a new one if none does (a copy, say)."""
        return cls._alive.get(id(subtree_ends)) or cls(subtree_ends)

    @property
    def num_tokens(self) -> int:
        """N, all roots together."""
        return self._ends.size

    @property
    def device(self) -> torch.device:
        """Where subtree_ends and the schedules are."""
        return self.subtree_ends.device

    @cached_property
    def visible_pairs(self) -> int:
        """Number of (query, key) pairs that attend: the sum over tokens of their depth + 1."""
        return int(self._ends.sum(dtype=np.int64)) - self.num_tokens * (self.num_tokens - 1) // 2

    @property
    def density(self) -> float:
        """visible_pairs / N^2: the share of a dense mask that is not hidden."""
        return self.visible_pairs / self.num_tokens**2

    @cached_property
    def nodes(self) -> np.ndarray:
        """Node segments in preorder, int32 [M, 3]: start, end, subtree_end.

        Attention is a causal square and a full rectangle a node (docs/architecture.md, fact 4).
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

    def waste(self, block_q: int, block_kv: int) -> float:
        """Pairs that these blocks compute, over visible_pairs: at least 1."""
        blocks = self.block_schedule(block_q, block_kv).kv_blocks.numel()
        return blocks * block_q * block_kv / self.visible_pairs

    def window_starts(self, window: int) -> Tensor:
        """The first token that each token sees of its last `window`, itself included.

        int32 [N] on the device: flat index of its (window - 1)-th ancestor, or of its root if it
        has fewer. Ancestors ascend with depth, so token i sees token j within the window iff
        window_starts[i] <= j <= i < subtree_ends[j]. Built on the host in O(N), then kept.

        Raises:
            ValueError: a window below 1.
        """
        key = "window_starts", window
        if key not in self.memo:
            starts = torch.from_numpy(_C.window_starts(self._ends, window))
            self.memo[key] = starts.to(self.device, non_blocking=True)
        return self.memo[key]

    def block_schedule(
        self, block_q: int, block_kv: int, window: int | None = None
    ) -> BlockSchedule:
        """The schedule for these block sizes, built on the host in O(N + pairs), then kept."""
        key = "schedule", block_q, block_kv, window
        if key not in self.memo:
            arrays = _C.block_schedule(self._ends, block_q, block_kv, window)
            tensors = [torch.from_numpy(a).to(self.device, non_blocking=True) for a in arrays]
            row_ptr, full_end, kv_blocks, q_range, q_order, kv_order, q_starts = tensors
            self.memo[key] = BlockSchedule(
                *(row_ptr, full_end, kv_blocks, q_range.view(-1, 4), q_order, kv_order),
                None if window is None else q_starts.view(-1, 2),
            )
        return self.memo[key]
