"""A constraint rules out tokens of its own response, and of no other."""

from __future__ import annotations

import pytest
import torch
from rollouts import CODEC, EOS, ids

from threadweaver.generate import Engine, GenerationSettings
from threadweaver.generate.constraint import constrained

SEQUENTIAL = GenerationSettings(mode="sequential", max_tokens=60)


class Alternating:
    """Any 'a' or 'b', then any digit, and so on; after six of them the end."""

    def __init__(self):
        self.taken: list[int] = []

    def allowed(self, vocabulary: int) -> torch.Tensor:
        choices = [EOS] if len(self.taken) == 6 else ids(["ab", "0123456789"][len(self.taken) % 2])
        return torch.zeros(vocabulary, dtype=torch.bool).index_fill_(0, torch.tensor(choices), True)

    def accept(self, token: int) -> None:
        self.taken.append(token)


def test_what_a_constraint_rules_out_is_never_drawn_and_others_are_as_without(fork_join_model):
    def run(constraint):
        engine = Engine(fork_join_model, CODEC, kv_gigabytes=0.01)
        for seed, limit in ((1, None), (2, constraint), (3, None)):
            engine.add(ids("0:"), SEQUENTIAL, seed, constraint=limit)
        return [rollout.response for rollout in engine.run()]

    constraint = Alternating()
    free, held = run(None), run(constraint)
    assert held[0] == free[0] and held[2] == free[2]
    assert held[1] != free[1] and constraint.taken == held[1]
    text = CODEC.decode(held[1][:-1])
    assert len(text) == 6 and set(text[::2]) <= set("ab") and text[1::2].isdigit()


def test_logits_without_constraints_are_not_copied():
    logits = torch.randn(2, 5)
    assert constrained(logits, [None, None]) is logits


def test_a_constraint_needs_sequential_mode(fork_join_model):
    engine = Engine(fork_join_model, CODEC, kv_gigabytes=0.01)
    with pytest.raises(ValueError, match="mode is parallel"):
        engine.add(ids("0:"), GenerationSettings(), constraint=Alternating())
