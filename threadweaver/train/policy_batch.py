"""Rollouts of a prompt as tries that hold all that the policy loss reads
(docs/semantics.md, "P-GRPO").

A rollout samples no token of the trie twice: threads of a block part in their headers, which are
forced, and what a join copies is context. So each call weighs its rollout's advantage on its
completion and zero on its context, and a token's weights add up once for each rollout that
sampled it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from threadweaver.generate.rollout import Completion, Rollout
from threadweaver.train.batches import pack
from threadweaver.train.passes import split
from tw_kernels import Trie, TrieBuilder


@dataclass(frozen=True, eq=False)
class PolicyTrie:
    """Rollouts as one trie, on the CPU.

    Attributes:
        trie: its columns "positive_advantages" and "negative_advantages" are, token by token, the
            sums of the positive and of the negative advantages of the rollouts that sampled it.
        sampled: int64 [n], flat indices of the tokens that some rollout sampled, ascending.
        counts: int64 [n], how many rollouts sampled each.
        positive_counts, negative_counts: int64 [n], how many of them have a positive and how many a
            negative advantage.
        generator_logprobs: float32 [n], what the generator gave each, untempered: the mean over its
            samplers, who had the same context and so differ by no more than rounding.
        sources: of the problems that the rollouts answer, each once (`Problem.source`).
    """

    trie: Trie
    sampled: Tensor
    counts: Tensor
    positive_counts: Tensor
    negative_counts: Tensor
    generator_logprobs: Tensor
    sources: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.trie)

    @property
    def num_completion_tokens(self) -> int:
        """Tokens of all completions, counted for each rollout."""
        return int(self.counts.sum())

    @classmethod
    def filler(cls, id: int) -> PolicyTrie:
        """A trie of two tokens that nobody sampled, one of which is predicted."""
        none, builder = np.zeros(2, np.float32), _builder()
        builder.add([id, id], positive_advantages=none, negative_advantages=none)
        zero = torch.zeros(1, dtype=torch.int64)
        return cls(builder.build(), zero + 1, zero, zero, zero, torch.zeros(1))

    @classmethod
    def pack(cls, parts: Sequence[PolicyTrie]) -> PolicyTrie:
        """Lays them side by side as one forest."""
        shifts = accumulate(map(len, parts[:-1]), initial=0)
        return cls(
            trie=Trie.pack([part.trie for part in parts]),
            sampled=torch.cat([p.sampled + s for p, s in zip(parts, shifts, strict=True)]),
            counts=torch.cat([part.counts for part in parts]),
            positive_counts=torch.cat([part.positive_counts for part in parts]),
            negative_counts=torch.cat([part.negative_counts for part in parts]),
            generator_logprobs=torch.cat([part.generator_logprobs for part in parts]),
            sources=tuple(dict.fromkeys(source for part in parts for source in part.sources)),
        )

    def split(self, most_tokens: int) -> list[PolicyTrie]:
        """Passes as of `passes.split`; what is said of a sampled token goes to its owner."""
        number = torch.full((len(self),), -1)  # of a token among those sampled
        number[self.sampled] = torch.arange(len(self.sampled))
        parts = []
        for part in split(self.trie, most_tokens):
            sampled = (part.owned & (number[part.nodes] >= 0)).nonzero().squeeze(-1)
            of = number[part.nodes[sampled]]
            parts.append(
                PolicyTrie(
                    trie=part.trie,
                    sampled=sampled,
                    counts=self.counts[of],
                    positive_counts=self.positive_counts[of],
                    negative_counts=self.negative_counts[of],
                    generator_logprobs=self.generator_logprobs[of],
                    sources=self.sources,
                )
            )
        return parts


class PolicyGroup(NamedTuple):
    """The rollouts of one prompt, and what the token budget left of them.

    Attributes:
        tries: one, or more if all rollouts together are over the budget; no rollout is divided.
        dropped_calls: calls cut off the ends of rollouts that are over the budget alone.
        skipped_rollouts: those whose first call alone is over it; none of their calls count as
            dropped.
    """

    tries: list[PolicyTrie]
    dropped_calls: int
    skipped_rollouts: int


def policy_group(
    rollouts: Sequence[Rollout], advantages: Sequence[float], max_tokens: int
) -> PolicyGroup:
    """Merges the rollouts of one prompt into tries of at most `max_tokens` tokens.

    Args:
        advantages: one for each rollout, broadcast to all tokens that it sampled.
    """
    tries: list[PolicyTrie] = []
    part: list[_Call] = []
    builder = _builder()  # of the trie of `part`
    dropped_calls = skipped_rollouts = 0
    for rollout, advantage in zip(rollouts, advantages, strict=True):
        calls = [_Call.of(c, advantage) for c in rollout.completions if c.tokens]
        kept, added = _within(calls, max_tokens, builder)
        if calls and not kept:
            skipped_rollouts += 1
            continue
        dropped_calls += len(calls) - len(kept)
        if part and builder.num_tokens + added > max_tokens:
            tries.append(_policy_trie(builder.build(), part))
            part, builder = [], _builder()
        for call in kept:
            call.add_to(builder)
        part += kept
    if part:
        tries.append(_policy_trie(builder.build(), part))
    return PolicyGroup(tries, dropped_calls, skipped_rollouts)


def micro_batches(tries: Sequence[PolicyTrie], max_tokens: int) -> list[PolicyTrie]:
    """Packs tries, of any number of prompts, into forests of at most `max_tokens` tokens.

    A trie that is larger by itself stays alone.
    """
    packs = pack([len(trie) for trie in tries], range(len(tries)), max_tokens)
    return [PolicyTrie.pack([tries[i] for i in indices]) for indices in packs]


class _Call(NamedTuple):
    """A path, and what holds from `start` on, where its completion begins."""

    path: list[int]
    start: int
    advantage: float
    logprobs: list[float]

    @classmethod
    def of(cls, completion: Completion, advantage: float) -> _Call:
        context, tokens = completion.context, completion.tokens
        return cls(context + tokens, len(context), advantage, completion.logprobs)

    def add_to(self, builder: TrieBuilder) -> None:
        weights = np.zeros(len(self.path), np.float32)
        weights[self.start :] = self.advantage
        builder.add(
            self.path,
            positive_advantages=weights.clip(min=0),
            negative_advantages=weights.clip(max=0),
        )


def _builder() -> TrieBuilder:
    return TrieBuilder("positive_advantages", "negative_advantages")


def _within(calls: list[_Call], max_tokens: int, others: TrieBuilder) -> tuple[list[_Call], int]:
    """The most calls, from the first on, whose own trie is within the budget (maybe none), and by
    how many tokens they would make the trie of `others` larger."""
    own = TrieBuilder()
    added = 0
    for n, call in enumerate(calls):
        shared = own.shared_prefix(call.path)
        if own.num_tokens + len(call.path) - shared > max_tokens:
            return calls[:n], added
        own.add(call.path)
        added += len(call.path) - max(shared, others.shared_prefix(call.path))
    return calls, added


def _policy_trie(trie: Trie, calls: list[_Call]) -> PolicyTrie:
    """`trie` holds the paths of the calls, in their order."""
    counts, positive, negative = torch.zeros(3, len(trie), dtype=torch.int64)
    logprobs = torch.zeros(len(trie), dtype=torch.float64)
    for i, call in enumerate(calls):
        nodes = trie.path_nodes(i)[call.start :]
        counts[nodes] += 1
        positive[nodes] += call.advantage > 0
        negative[nodes] += call.advantage < 0
        logprobs[nodes] += torch.tensor(call.logprobs, dtype=torch.float64)
    sampled = counts.nonzero().squeeze(-1)
    return PolicyTrie(
        trie=trie,
        sampled=sampled,
        counts=counts[sampled],
        positive_counts=positive[sampled],
        negative_counts=negative[sampled],
        generator_logprobs=(logprobs[sampled] / counts[sampled]).float(),
    )
