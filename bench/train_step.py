"""One SFT update through the trie and call by call: `python -m bench.train_step --help`.

Same model, same supervised tokens, same loss. The unrolled peer runs every call as a sequence of
its own under causal SDPA, without padding, and accumulates gradients.

    token ratio   unrolled tokens / trie tokens: what sharing prefixes could save at best, were the
                  cost of a token always the same
    x unrolled    how many times faster than unrolled calls
    of ratio      x unrolled / token ratio
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from bench import shapes
from bench.frame import Options, Peer, Row, Suite, main
from threadweaver.model import ATTENTION, cross_entropy_sum, output_layer, trie_loss
from tw_kernels import Trie, TrieLayout

OURS, UNROLLED = "ours: trie", "unrolled calls"
# The output layer then has 8 % of the weights, as in Qwen3-8B: its cost is the same for both peers.
VOCABULARY = 2048
TOLERANCE = 1e-5  # relative, of the gradient of all parameters in float32


class StepSetup:
    """A model, a trajectory, and which of its tokens carry loss: those that no earlier call has."""

    input_sets = 1

    def __init__(self, case: shapes.Case, device: str):
        self.case = case
        self.device = torch.device(device)

    @property
    def key(self) -> Row:
        n, unrolled = len(self.case.trie), self.case.unrolled
        return {"case": self.case.name, "n": n, "unrolled": unrolled, "token_ratio": unrolled / n}

    @cached_property
    def paths(self) -> list[list[int]]:
        """The case's paths in a small vocabulary, branching where they did (`trie` checks it)."""
        return [[token % VOCABULARY for token in path] for path in self.case.paths]

    @cached_property
    def first_with_loss(self) -> list[int]:
        """For each path the position from which on it is its own: what earlier ones do not have."""
        trie = self.case.trie
        owner = torch.full((len(trie),), trie.num_paths)
        nodes = [trie.path_nodes(i) for i in range(trie.num_paths)]
        for i in reversed(range(trie.num_paths)):
            owner[nodes[i]] = i
        return [max(1, int((owner[at] < i).sum())) for i, at in enumerate(nodes)]

    @cached_property
    def trie(self) -> Trie:
        weights = [
            [0.0] * first + [1.0] * (len(path) - first)
            for path, first in zip(self.paths, self.first_with_loss, strict=True)
        ]
        trie = Trie.from_paths(self.paths, weights)
        assert torch.equal(trie.subtree_ends, self.case.trie.subtree_ends)
        return trie

    @cached_property
    def layout(self) -> TrieLayout:
        return self.trie.layout(self.device)

    @cached_property
    def model(self) -> PreTrainedModel:
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=64,
            max_position_embeddings=65536,
        )
        model = Qwen3ForCausalLM(config)
        torch.nn.Module.to(model, self.device)
        return model.train()

    def gradient(self) -> Tensor:
        """All gradients as one vector; they are cleared."""
        gradient = torch.cat(
            [p.grad.flatten() for p in self.model.parameters() if p.grad is not None]
        )
        self.model.zero_grad()
        return gradient

    @cached_property
    def expected(self) -> Tensor:
        unrolled_step(self)
        return self.gradient()

    def check(self, peer: str, result: Any, inputs: int) -> str | None:
        gradient = self.gradient()
        error = ((gradient - self.expected).norm() / self.expected.norm()).item()
        return None if error <= TOLERANCE else f"its gradient is off by {error:.1e}"

    def figures(self, peer: str, seconds: float) -> Row:
        return {"trie_tokens_per_second": len(self.case.trie) / seconds}


def trie_step(setup: StepSetup) -> None:
    setup.model.set_attn_implementation(ATTENTION)
    trie_loss(setup.model, setup.trie, setup.layout).backward()


def unrolled_step(setup: StepSetup) -> None:
    setup.model.set_attn_implementation("sdpa")
    head = output_layer(setup.model)
    for path, first in zip(setup.paths, setup.first_with_loss, strict=True):
        ids = torch.tensor(path, device=setup.device)
        hidden = setup.model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
        cross_entropy_sum(hidden[first - 1 : -1], head, ids[first:]).backward()


def _prepare(step: Callable[[StepSetup], None]) -> Callable[[StepSetup], Callable[[int], None]]:
    def prepare(setup: StepSetup) -> Callable[[int], None]:
        _ = setup.expected, setup.trie, setup.layout
        setup.model.zero_grad()
        return lambda _: step(setup)

    return prepare


def setups(options: Options) -> Iterator[StepSetup]:
    sizes = ((300, 2),) if options.quick else ((512, 2), (2048, 3), (4096, 4), (8192, 5))
    for size in sizes:
        yield StepSetup(shapes.trajectory(*size), options.device)


def relate(rows: list[Row]) -> None:
    by_peer = {row["peer"]: row for row in rows if row["status"] == "ok"}
    for row in by_peer.values():
        if UNROLLED in by_peer:
            row["x_unrolled"] = by_peer[UNROLLED]["ms"] / row["ms"]
            row["of_ratio"] = row["x_unrolled"] / row["token_ratio"]


SUITE = Suite(
    name="train_step",
    options=Options,
    setups=setups,
    peers=[Peer(OURS, _prepare(trie_step), ours=True), Peer(UNROLLED, _prepare(unrolled_step))],
    relate=relate,
    columns={
        "trie_tokens_per_second": "trie tokens/s",
        "x_unrolled": "x unrolled",
        "of_ratio": "of ratio",
    },
)

if __name__ == "__main__":
    raise SystemExit(main(SUITE))
