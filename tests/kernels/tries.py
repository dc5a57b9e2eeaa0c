"""Random and real tries, and the definition of trie attention once more, in float64.

The definition computes on the device of its inputs: a GPU's tests do not wait for CPU cores.
"""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tw_kernels import Trie, TrieLayout

DATA = Path(__file__).parents[1] / "data"


def random_paths(rng: np.random.Generator, roots: int, branches: int, length: int) -> list[list]:
    """Paths of `roots` forests: each new path leaves an earlier one of its root at random."""
    paths: list[list] = []
    fresh = iter(range(10**9))
    for _ in range(roots):
        own = [[next(fresh) for _ in range(rng.integers(1, length + 1))]]
        for _ in range(rng.integers(0, branches + 1)):
            base = own[rng.integers(len(own))]
            cut = rng.integers(1, len(base) + 1)
            own.append(base[:cut] + [next(fresh) for _ in range(rng.integers(1, length + 1))])
        paths += own
    return paths


def random_layout(seed: int, roots: int = 3, branches: int = 6, length: int = 40) -> TrieLayout:
    rng = np.random.default_rng(seed)
    return Trie.from_paths(random_paths(rng, roots, branches, length)).layout()


def real_trees(scale: float = 1.0) -> dict[str, Trie]:
    """The reasoning trees of tests/data/tree_of_thoughts.json, node sizes scaled."""
    tries = {}
    for task, trees in json.loads((DATA / "tree_of_thoughts.json").read_text()).items():
        for number, tree in enumerate(trees):
            fresh = iter(range(10**9))
            paths: list[list[int]] = []
            for size, parent in zip(tree["sizes"], tree["parents"], strict=True):
                own = [next(fresh) for _ in range(max(1, round(size * scale)))]
                paths.append((paths[parent] if parent >= 0 else []) + own)
            tries[f"{task}-{number}"] = Trie.from_paths(paths)
    return tries


def node_prefixes(trie: Trie) -> list[tuple[int, ...]]:
    """Of every token the tokens on its path, itself last."""
    prefixes: list[tuple[int, ...]] = []
    for token, parent in zip(trie.tokens.tolist(), trie.parents.tolist(), strict=True):
        prefixes.append((*(prefixes[parent] if parent >= 0 else ()), token))
    return prefixes


def visible(subtree_ends: Tensor) -> Tensor:
    """[N, N] bool: row i sees column j (docs/architecture.md, fact 1)."""
    i = torch.arange(subtree_ends.numel(), device=subtree_ends.device)
    return (i <= i[:, None]) & (i[:, None] < subtree_ends[None, :])


def within(mask: Tensor, window: int | None) -> Tensor:
    """A trie's mask [N, N] under a window: no row sees an ancestor `window` or more above it."""
    if window is None:
        return mask
    depth = mask.sum(1)
    return mask & (depth[:, None] - depth < window)


def oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Masked softmax attention in float64: out [N, Hq, D], lse [Hq, N]. Differentiable."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double(), v.double()
    scores = torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(group, 1)) * scale
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, len(q), 1)], -1)
    p = scores.softmax(-1)[..., : len(q)]
    out = torch.einsum("hij,jhd->ihd", p, v.repeat_interleave(group, 1))
    return out, scores.logsumexp(-1)


def relative_error(got: Tensor, want: Tensor) -> float:
    """Frobenius norm of the difference over that of `want`."""
    return ((got.double() - want).norm() / want.norm()).item()
