"""Training data as tries, and which of them go into which step.

Finished trajectories become tries once, before training, so that bad data stops a run at its start.
The order of the steps is a pure function of (sizes, seed, epoch): the number of steps done is all
that a checkpoint must hold to continue at the next batch.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count

import torch

from threadweaver.data import DataError, Example
from threadweaver.train.config import DataConfig, OptimizationConfig
from threadweaver.trajectory import Codec, loss_trie, violations
from tw_kernels import Trie

# Tries are packed among this many micro-batches' worth of neighbours in the shuffled order: enough
# for full packs, few enough that long tries do not always meet the same short ones.
PACKING_WINDOW = 64


@dataclass(frozen=True)
class TrieSet:
    """The tries of one data file.

    Attributes:
        tries: one for each trajectory that is used.
        sources: where each comes from, "file:line".
        dropped_calls: calls cut off the ends of trajectories to keep them within the budget.
        dropped_trajectories: malformed ones left out (data.malformed: drop).
    """

    tries: list[Trie]
    sources: list[str]
    dropped_calls: int
    dropped_trajectories: int

    @property
    def sizes(self) -> list[int]:
        return [len(trie) for trie in self.tries]

    @cached_property
    def fingerprint(self) -> str:
        """Same tokens, geometry and loss in the same order: same value."""
        digest = hashlib.sha256()
        for trie in self.tries:
            for tensor in (trie.tokens, trie.subtree_ends, trie.columns["weights"]):
                digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()


def build_tries(
    examples: Iterable[Example],
    codec: Codec,
    data: DataConfig,
    batch_tokens: int,
    context_length: int | None = None,
) -> TrieSet:
    """Examples as tries, each response with one end token (`Codec.encode_response`).

    Raises:
        DataError: naming file and line: a prompt that the chat template refuses, or that another
            model's has written; a response that holds a control token, breaks the format (unless
            they are to be dropped), has a first call that alone is over the budget of
            `batch_tokens`, or is longer than the model's context.
    """
    tries, sources = [], []
    dropped_calls = dropped_trajectories = 0
    for example in examples:
        try:
            codec.check_markup(example.prompt)
            prompt = codec.encode_prompt(example.prompt)
            response = codec.prompts.after(example.prompt, example.response)
            ids = [*prompt, *codec.encode_response(response)]
        except ValueError as error:
            raise DataError(f"{example.source}: {error}") from error
        text = codec.prompts.text(example.prompt)
        if problems := violations(text, response, data.max_depth):
            if data.malformed == "error":
                raise DataError(
                    f"{example.source}: the response breaks the format: {problems[0]}; correct it "
                    "or leave such rows out with --data.malformed drop"
                )
            dropped_trajectories += 1
            continue
        try:
            built = loss_trie(
                ids,
                codec,
                len(prompt),
                data.loss,
                max_tokens=batch_tokens,
                max_depth=data.max_depth,
            )
        except ValueError as error:
            raise DataError(f"{example.source}: {error} (optimization.batch_tokens)") from error
        longest = int(built.trie.positions.max()) + 1
        if context_length is not None and longest > context_length:
            raise DataError(
                f"{example.source}: {longest} tokens with the end token, and the model's context "
                f"ends at {context_length} (max_position_embeddings): shorten or remove the row"
            )
        tries.append(built.trie)
        sources.append(example.source)
        dropped_calls += built.dropped_calls
    return TrieSet(tries, sources, dropped_calls, dropped_trajectories)


def unrolled_tokens(trie: Trie) -> int:
    """Tokens of the maximal paths: what training them one by one would compute."""
    is_leaf = trie.subtree_ends == torch.arange(1, len(trie) + 1)
    return int((trie.positions[is_leaf] + 1).sum())


def pack(sizes: Sequence[int], order: Iterable[int], budget: int) -> list[list[int]]:
    """First-fit decreasing: indices into `sizes` in packs of at most `budget`, ties in `order`."""
    packs: list[list[int]] = []
    room: dict[int, int] = {}  # of the packs that another may fit into
    least = min(sizes, default=0)
    for i in sorted(order, key=lambda i: -sizes[i]):
        at = next((b for b, free in room.items() if sizes[i] <= free), len(packs))
        if at == len(packs):
            packs.append([])
            room[at] = budget
        packs[at].append(i)
        room[at] -= sizes[i]
        if room[at] < least:
            del room[at]
    return packs


@dataclass(frozen=True)
class Step:
    """What one optimizer step trains on: for each micro-batch the indices of its tries."""

    epoch: int
    micro_batches: list[list[int]]
    ends_epoch: bool


def epoch_steps(
    sizes: Sequence[int], optimization: OptimizationConfig, seed: int, epoch: int
) -> list[Step]:
    """The steps of one epoch (counted from 0): every trie once, in an order all of its own."""
    rng = random.Random(f"{seed}/{epoch}")
    order = list(range(len(sizes)))
    rng.shuffle(order)
    budget = optimization.batch_tokens
    packs = [p for window in _windows(sizes, order, budget) for p in pack(sizes, window, budget)]
    rng.shuffle(packs)
    starts = range(0, len(packs), optimization.accumulation)
    steps = [packs[i : i + optimization.accumulation] for i in starts]
    return [Step(epoch, micro, i == len(steps) - 1) for i, micro in enumerate(steps)]


def _windows(sizes: Sequence[int], order: list[int], budget: int) -> Iterator[list[int]]:
    window, total = [], 0
    for i in order:
        window.append(i)
        total += sizes[i]
        if total >= PACKING_WINDOW * budget:
            yield window
            window, total = [], 0
    yield window


def all_steps(
    sizes: Sequence[int], optimization: OptimizationConfig, seed: int
) -> tuple[int, Iterator[Step]]:
    """How many steps the run has, and the steps of epoch after epoch without end."""
    epochs = (epoch_steps(sizes, optimization, seed, epoch) for epoch in count())
    total = optimization.max_steps
    if total is None:
        total = sum(
            len(epoch_steps(sizes, optimization, seed, e)) for e in range(optimization.epochs)
        )
    return total, (step for epoch in epochs for step in epoch)
