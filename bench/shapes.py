"""The tries that benchmarks run on. A case is a set of paths; everything else follows from it.

Stars and trajectories scale smoothly and have known arithmetic; the trees of thoughts were recorded
from published programs (DeFT, ICLR 2025), so their shapes are nobody's choice here.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

from tw_kernels import Trie

TREES = Path(__file__).parent.parent / "tests" / "data" / "tree_of_thoughts.json"
VOCABULARY = 50_000
STAR_THREADS = 12
NEWLINE, THREAD, COLON = VOCABULARY, VOCABULARY + 1, VOCABULARY + 2
NUMBERS = VOCABULARY + 3  # the token of thread number 1


@dataclass(frozen=True)
class Case:
    """One trie, named; built when first asked for."""

    name: str
    build: Callable[[], list[list[int]]]

    @cached_property
    def paths(self) -> list[list[int]]:
        return self.build()

    @cached_property
    def trie(self) -> Trie:
        return Trie.from_paths(self.paths)

    @property
    def unrolled(self) -> int:
        """Tokens of all paths together: what training path by path would compute."""
        return sum(map(len, self.paths))


def _text(rng: random.Random, n: int) -> list[int]:
    return [rng.randrange(VOCABULARY) for _ in range(n)]


def _threads(lengths: list[int], rng: random.Random) -> list[list[int]]:
    """Texts that differ in their first token, so that they branch where they should."""
    starts = rng.sample(range(VOCABULARY), len(lengths))
    return [[s, *_text(rng, n - 1)] for s, n in zip(starts, lengths, strict=True)]


def star(n: int, threads: int = STAR_THREADS) -> Case:
    """A prefix of n / 4 tokens and equal threads after it.

    Density 7/32 + 9/(32 threads): 0.242 for 12 threads.
    """

    def build() -> list[list[int]]:
        rng = random.Random(n)
        prefix, rest = _text(rng, n // 4), n - n // 4
        lengths = [rest * (t + 1) // threads - rest * t // threads for t in range(threads)]
        return [prefix + thread for thread in _threads(lengths, rng)]

    return Case(f"star-{n}", build)


def pack(tries: int, n: int) -> Case:
    """A forest of small stars (four threads), as a batch of short rollouts gives."""

    def build() -> list[list[int]]:
        roots = random.Random(tries).sample(range(VOCABULARY), tries)
        paths = star(n, threads=4).paths
        return [[root, *path[1:]] for root in roots for path in paths]

    return Case(f"pack-{tries}x{n}", build)


def fork(rollouts: int, threads: int, prefix: int, suffix: int) -> Case:
    """Threads of several rollouts of one prompt: a prefix that all share, and each its suffix."""

    def build() -> list[list[int]]:
        rng = random.Random(prefix)
        shared = _text(rng, prefix)
        return [shared + thread for thread in _threads([suffix] * rollouts * threads, rng)]

    return Case(f"fork-{rollouts}x{threads}-{prefix}+{suffix}", build)


def trajectory(n: int, blocks: int, threads: int = 4) -> Case:
    """A finished fork-join trajectory of `n` trie tokens, unrolled as SPEC says ("State machine").

    Each block forks `threads` threads of uneven lengths after some sequential text; its join is the
    context of the next. The paths are the maximal ones: threads 2 and later of every block, and the
    joined trajectory itself, which contains thread 1 of each.
    """

    def build() -> list[list[int]]:
        rng = random.Random(n)
        # In units of one mean thread: the prompt, then of every block the text before it and its
        # threads. A thread after the first counts twice, for it is in the trie twice.
        prompt, before = 0.2, [rng.uniform(0.2, 0.8) for _ in range(blocks)]
        parts = [[rng.uniform(0.5, 1.5) for _ in range(threads)] for _ in range(blocks)]
        total = prompt + sum(before) + sum(2 * sum(p) - p[0] for p in parts)
        headers = blocks * (1 + 4 * threads + 5 * (threads - 1))
        unit = (n - headers - 1) / total
        if unit < 2:
            raise ValueError(f"{n} tokens are too few for {blocks} blocks of {threads} threads")
        context = _text(rng, int(prompt * unit) + 1)
        paths, tokens = [], len(context)
        for text, lengths in zip(before, parts, strict=True):
            context = context + _text(rng, int(text * unit))
            tokens += int(text * unit) + 1
            joined = [*context, NEWLINE]
            for number, length in enumerate(lengths):
                header = [THREAD, NEWLINE, NUMBERS + number, COLON]
                thread = header + _text(rng, int(length * unit))
                if number:
                    paths.append([*context, NEWLINE, *thread])
                joined += thread
                tokens += len(thread) * (2 if number else 1)
                # "\n<Thread>\n" is one piece that all threads share.
                tokens -= 2 if number else 0
            context = joined
        return [*paths, context + _text(rng, n - tokens)]

    return Case(f"trajectory-{n}", build)


class Call(NamedTuple):
    """A request of the state machine, and what came back."""

    context: list[int]
    completion: list[int]


def rollouts(
    count: int, blocks: int, threads: int, prompt: int, text: int, thread: tuple[int, int]
) -> list[list[Call]]:
    """The calls of each of `count` rollouts of one prompt, as SPEC says ("State machine").

    Each samples `text` tokens, then forks `threads` threads of lengths in the range `thread`, joins
    them, and so on, `blocks` times; `text` more tokens end it.
    """
    rng = random.Random(count)
    question = _text(rng, prompt)

    def rollout() -> list[Call]:
        context, calls = question, []
        for _ in range(blocks):
            calls.append(Call(context, _text(rng, text)))
            context = context + calls[-1].completion
            joined = [*context, NEWLINE]
            for number in range(threads):
                header = [THREAD, NEWLINE, NUMBERS + number, COLON]
                tokens = _text(rng, rng.randint(*thread))
                calls.append(Call([*context, NEWLINE, *header], tokens))
                joined += header + tokens
            context = [*joined, NEWLINE]
        return [*calls, Call(context, _text(rng, text))]

    return [rollout() for _ in range(count)]


@cache
def _trees() -> dict[str, list[dict[str, list[int]]]]:
    return json.loads(TREES.read_text())


def tree_of_thoughts(task: str, index: int) -> Case:
    """A recorded tree, every token its own id. `task`: sorting128ToT or docmergeToT."""

    def build() -> list[list[int]]:
        tree = _trees()[task][index]
        # Nodes come in creation order: a node's parent is before it, its subtree anywhere after.
        paths: list[list[int]] = []
        first = 0
        for size, parent in zip(tree["sizes"], tree["parents"], strict=True):
            above = paths[parent] if parent >= 0 else []
            paths.append(above + list(range(first, first + size)))
            first += size
        inner = set(tree["parents"])
        return [path for node, path in enumerate(paths) if node not in inner]

    return Case(f"{task}-{index}", build)
