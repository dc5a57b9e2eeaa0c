"""The tries that benchmarks run on. A case is a named set of paths.

Stars, packs, forks and trajectories are synthetic and exist in every size; the trees of thoughts
were recorded from published programs (DeFT, ICLR 2025).
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
NEWLINE, THREAD, COLON = VOCABULARY, VOCABULARY + 1, VOCABULARY + 2
NUMBERS = VOCABULARY + 3  # the token of thread number 1


@dataclass(frozen=True)
class Case:
    """A named set of paths and its trie, built at first use."""

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
        """The number of tokens of all paths: what training path by path computes."""
        return sum(map(len, self.paths))


def _text(rng: random.Random, n: int) -> list[int]:
    return [rng.randrange(VOCABULARY) for _ in range(n)]


def _threads(lengths: list[int], rng: random.Random) -> list[list[int]]:
    """Random texts of these lengths that differ in their first token, so that they branch there."""
    starts = rng.sample(range(VOCABULARY), len(lengths))
    return [[s, *_text(rng, n - 1)] for s, n in zip(starts, lengths, strict=True)]


def star(n: int, threads: int = 12) -> Case:
    """A prefix of n / 4 tokens and equal threads after it.

    Density 7/32 + 9/(32 threads): 0.242 for 12 threads.
    """

    def build() -> list[list[int]]:
        rng = random.Random(n)
        prefix, rest = _text(rng, n // 4), n - n // 4
        lengths = [rest * (t + 1) // threads - rest * t // threads for t in range(threads)]
        return [prefix + thread for thread in _threads(lengths, rng)]

    return Case(f"star-{n}", build)


def chain(n: int) -> Case:
    """One path: plain causal attention, the work that causal peers do."""
    return Case(f"chain-{n}", lambda: [_text(random.Random(n), n)])


def pack(tries: int, n: int) -> Case:
    """A forest of stars of n tokens and four threads, like a batch of short rollouts."""

    def build() -> list[list[int]]:
        roots = random.Random(tries).sample(range(VOCABULARY), tries)
        paths = star(n, threads=4).paths
        return [[root, *path[1:]] for root in roots for path in paths]

    return Case(f"pack-{tries}x{n}", build)


def fork(rollouts: int, threads: int, prefix: int, suffix: int) -> Case:
    """Threads of several rollouts of one prompt: a shared prefix, and a suffix for each thread."""

    def build() -> list[list[int]]:
        rng = random.Random(prefix)
        shared = _text(rng, prefix)
        return [shared + thread for thread in _threads([suffix] * rollouts * threads, rng)]

    return Case(f"fork-{rollouts}x{threads}-{prefix}+{suffix}", build)


def trajectory(n: int, blocks: int, threads: int = 4) -> Case:
    """A finished fork-join trajectory of `n` trie tokens (docs/semantics.md, "State machine").

    Each block forks `threads` threads of uneven lengths after some sequential text; its join is the
    context of the next. The paths are the maximal ones: threads 2 and later of every block, and the
    joined trajectory itself, which contains thread 1 of each.
    """

    def build() -> list[list[int]]:
        rng = random.Random(n)
        # Lengths in units of a mean thread: the prompt, the text before each block, its threads. A
        # thread after the first is in the trie twice, so it counts twice.
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
                # The trie has "\n<Thread>\n", common to the block's threads, only once.
                tokens -= 2 if number else 0
            context = joined
        return [*paths, context + _text(rng, n - tokens)]

    return Case(f"trajectory-{n}", build)


class Call(NamedTuple):
    """The token ids of a request of the state machine and of its completion."""

    context: list[int]
    completion: list[int]


def rollouts(
    count: int, blocks: int, threads: int, prompt: int, text: int, thread: tuple[int, int]
) -> list[list[Call]]:
    """The calls of each of `count` rollouts of one prompt (docs/semantics.md, "State machine").

    A rollout has `blocks` blocks: `text` tokens, then `threads` threads of lengths in the range
    `thread`. `text` more tokens end it.
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
    """A recorded tree in which all token ids differ. `task`: sorting128ToT or docmergeToT."""

    def build() -> list[list[int]]:
        tree = _trees()[task][index]
        # Nodes are in creation order: a node's parent comes before it.
        paths: list[list[int]] = []
        first = 0
        for size, parent in zip(tree["sizes"], tree["parents"], strict=True):
            above = paths[parent] if parent >= 0 else []
            paths.append(above + list(range(first, first + size)))
            first += size
        inner = set(tree["parents"])
        return [path for node, path in enumerate(paths) if node not in inner]

    return Case(f"{task}-{index}", build)
