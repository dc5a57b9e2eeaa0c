"""Which rank computes which micro-batches of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedModel

from tw_kernels import Trie


class Deal(NamedTuple):
    """Attributes:
    of_ranks: for each rank the micro-batches that it computes, by index; rank by rank as many,
        or one fewer at the end.
    passes: micro-batches of the rank that has most.
    imbalance: time that the step takes over that of ranks that never wait, by the costs; at
        least 1.
    """

    of_ranks: list[list[int]]
    passes: int
    imbalance: float


def deal(costs: Sequence[float], num_ranks: int) -> Deal:
    """Deals micro-batches to ranks, equally many to each.

    Ranks wait for each other in every layer of every pass, so the micro-batches that run at the
    same time are those next to each other by cost, the dearest first; among those, the dearest goes
    to the rank that has least so far. One rank keeps their order.

    Args:
        costs: of each micro-batch.
    """
    if num_ranks == 1:
        return Deal([list(range(len(costs)))], len(costs), 1.0)
    order = sorted(range(len(costs)), key=lambda i: -costs[i])
    of_ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    totals = [0.0] * num_ranks
    at_once = [order[i : i + num_ranks] for i in range(0, len(order), num_ranks)]
    for same_time in at_once:
        free = sorted(range(num_ranks), key=lambda rank: totals[rank])
        for rank, i in zip(free, same_time, strict=False):
            of_ranks[rank].append(i)
            totals[rank] += costs[i]
    longest = sum(costs[same_time[0]] for same_time in at_once)
    mean = sum(totals) / num_ranks
    return Deal(of_ranks, len(at_once), longest / mean if mean else 1.0)


class Cost:
    """What forward and backward pass of a trie cost, in floating-point operations: 6 for each
    parameter and token, and 14 for each pair of tokens that sees each other, head and dimension of
    attention (4 forward; 10 backward, where the scores are computed again).

    Args:
        model: whose passes they are.
    """

    def __init__(self, model: PreTrainedModel):
        config = model.config.get_text_config()
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        self._of_token = 6.0 * sum(p.numel() for p in model.parameters())
        self._of_pair = 14.0 * config.num_hidden_layers * heads * head_dim

    def __call__(self, trie: Trie) -> float:
        pairs = int((trie.positions + 1).sum())  # a token sees its path
        return self._of_token * len(trie) + self._of_pair * pairs
