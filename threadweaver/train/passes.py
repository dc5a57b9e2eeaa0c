"""A trie in several passes, each of them a smaller trie: for tries that do not fit at once.

A hidden state depends on its own path alone (docs/architecture.md, fact 1). So a pass may be any
set of tokens that holds with each its ancestors, and a token's log-probability, which is read from
its parent's hidden state (fact 5), is the same in every pass that holds the token. One pass owns
it, and its loss counts there alone; then losses and gradients of the passes add up to those of the
whole. What passes have in common, the prefixes of their paths, each of them computes.

Passes are made of whole root-to-leaf paths: cutting a path would repeat its beginning and spare
nothing. Two passes that become one below a shared prefix of d tokens spare d tokens. So, from the
deepest branch to the roots, what hangs on a branch is packed first-fit decreasing into as few
passes as the room below the shared prefix allows. That need not be the least: on the trees of
`tests/data` and random ones 1.3 % more tokens are computed, on average, than the bound of
`tests/train/test_passes.py`, which no passes can be below, and 20 % in the worst of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from threadweaver.train.batches import pack
from tw_kernels import Trie


@dataclass(frozen=True, eq=False)
class Pass:
    """A part of a trie of N tokens, on the CPU.

    Attributes:
        trie: some of its tokens, n of them, in the same order. Columns are those of the whole at
            tokens that the pass owns, and zero at others; paths are those whose last token it owns.
        nodes: int64 [n], flat index in the whole of each token, ascending.
        owned: bool [n], whether the token's loss counts in this pass. Every token of the whole is
            owned by one pass.
    """

    trie: Trie
    nodes: Tensor
    owned: Tensor

    def __len__(self) -> int:
        return len(self.trie)


def split(trie: Trie, most_tokens: int) -> list[Pass]:
    """Passes of at most `most_tokens` tokens, or as many as the longest path has if that is more;
    a trie that fits is one pass. In O(tokens of all passes), and the same each time.
    """
    if len(trie) <= most_tokens:
        return [Pass(trie, torch.arange(len(trie)), torch.ones(len(trie), dtype=torch.bool))]
    segments = _segments(trie)
    room = max(most_tokens, int(trie.positions.max()) + 1)
    groups = sorted(sorted(group.leaves) for group in _groups(segments, room))
    nodes = [segments.nodes_above(leaves) for leaves in groups]
    owners = np.full(len(trie), -1)
    for i, held in enumerate(nodes):
        owners[held[owners[held] < 0]] = i
    ends = trie.path_ends.numpy()
    by_owner = np.argsort(owners[ends], kind="stable")
    counts = np.bincount(owners[ends], minlength=len(nodes))
    paths = np.split(ends[by_owner], counts.cumsum()[:-1])
    return [
        _part(trie, held, owners[held] == i, path_ends)
        for i, (held, path_ends) in enumerate(zip(nodes, paths, strict=True))
    ]


class _Segments(NamedTuple):
    """Maximal runs in which every token is the only child of the one before it, in preorder.

    Attributes:
        bounds: int [M, 2], flat index of the first token, and one past the last.
        parents: of each the segment that it hangs on; -1 at a root.
        depths: tokens of the path down to its end.
    """

    bounds: list[list[int]]
    parents: list[int]
    depths: list[int]

    def nodes_above(self, leaves: list[int]) -> np.ndarray:
        """Flat indices of the tokens of these segments and of all segments above, ascending."""
        found: set[int] = set()
        for segment in leaves:
            while segment >= 0 and segment not in found:
                found.add(segment)
                segment = self.parents[segment]
        return np.concatenate([np.arange(*self.bounds[segment]) for segment in sorted(found)])


def _segments(trie: Trie) -> _Segments:
    nodes = trie.layout().nodes
    starts, ends = nodes[:, 0], nodes[:, 1]
    above = trie.parents.numpy()[starts]
    parents = np.searchsorted(starts, above, side="right") - 1
    depths = trie.positions.numpy()[ends - 1] + 1
    return _Segments(nodes[:, :2].tolist(), parents.tolist(), depths.tolist())


@dataclass
class _Group:
    """Leaves that share a pass, as segments.

    Attributes:
        size: tokens that the pass has below the branch that is looked at.
    """

    leaves: list[int]
    size: int


def _groups(segments: _Segments, room: int) -> list[_Group]:
    """The leaves of the whole trie in passes of at most `room` tokens."""
    # By segment, what hangs on it; the last is for the roots.
    below: list[list[_Group]] = [[] for _ in range(len(segments.parents) + 1)]
    for i in reversed(range(len(segments.parents))):
        start, end = segments.bounds[i]
        groups, below[i] = below[i], []
        merged = _merged(groups, room - segments.depths[i]) if groups else [_Group([i], 0)]
        for group in merged:
            group.size += end - start
        below[segments.parents[i]] += merged
    return _merged(below[-1], room)


def _merged(groups: list[_Group], room: int) -> list[_Group]:
    merged = []
    for first, *others in pack([group.size for group in groups], range(len(groups)), room):
        whole = groups[first]
        for other in others:
            whole.leaves += groups[other].leaves
            whole.size += groups[other].size
        merged.append(whole)
    return merged


def _part(trie: Trie, held: np.ndarray, owned: np.ndarray, path_ends: np.ndarray) -> Pass:
    """`held`: flat indices; `path_ends` likewise, of paths that end in a token that is owned."""
    nodes, is_owned = torch.from_numpy(held), torch.from_numpy(owned)
    # How many of those held come before a token of the whole: its index among them.
    parents = trie.parents.numpy()[held]
    ends = np.searchsorted(held, trie.subtree_ends.numpy()[held])
    part = Trie(
        tokens=trie.tokens[nodes],
        positions=trie.positions[nodes],
        parents=torch.from_numpy(np.where(parents < 0, -1, np.searchsorted(held, parents))),
        subtree_ends=torch.from_numpy(ends.astype(np.int32)),
        path_ends=torch.from_numpy(np.searchsorted(held, path_ends).astype(np.int32)),
        columns={name: torch.where(is_owned, c[nodes], 0) for name, c in trie.columns.items()},
    )
    return Pass(part, nodes, is_owned)
