"""The setups of bench.train_step and bench.model_step: one update of a model, its passes, and the
check of its gradient."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from bench import shapes
from bench.attention_setup import BACKWARD, FORWARD
from bench.roofline import Work
from bench.suite import Row, Setup, Skip
from threadweaver.generate.rollout import Completion, Rollout
from threadweaver.generate.weaver import LimitCounts
from threadweaver.model import (
    ATTENTION,
    cross_entropy_sum,
    output_layer,
    to_device,
    token_logprobs,
    trie_logprobs,
    trie_loss,
)
from threadweaver.train.advantages import group_advantages
from threadweaver.train.batches import pack
from threadweaver.train.policy_batch import policy_group
from threadweaver.train.policy_loss import PolicyConfig, policy_loss
from tw_kernels import Trie

# So small that the output layer, whose cost is the same for all peers, has 8 % of the weights, as
# in Qwen3-8B.
VOCABULARY = 2048
TOLERANCE = 1e-5  # relative, of the gradient of all parameters in float32
PACK_TOKENS = 10_240  # actor.ppo_max_token_len_per_gpu of the published run
# Rewards of 8 rollouts: 0 if wrong, else 1 plus a bonus for acceleration (docs/semantics.md,
# "Reward").
REWARDS = [1.1, 0.0, 1.1, 1.05, 0.0, 1.1, 1.08, 0.0]


class Call(NamedTuple):
    """One call of a rollout.

    Attributes:
        path: context and completion. A token's id is the entry modulo VOCABULARY; multiples of
            VOCABULARY only keep equal tokens of different calls apart in a trie.
        start: where the tokens that carry loss begin.
        weight: of each of them in the loss.
    """

    path: list[int]
    start: int
    weight: float


class Pass(NamedTuple):
    """One forward and backward pass.

    Attributes:
        tokens: the number of tokens it computes.
        attention: the model's attn_implementation.
        loss: computes its share of the loss.
    """

    tokens: int
    attention: str
    loss: Callable[[], Tensor]


class StepSetup(Setup):
    """A model, and one update of it.

    Attributes:
        tolerance: of `gradient`, relative.
        rollouts: the calls of each rollout.
        tokens: peer -> the number of tokens it computes.
    """

    tolerance = TOLERANCE

    def __init__(self, update: str, case: str, rollouts: list[list[Call]], device: str):
        self.update, self.case, self.rollouts = update, case, rollouts
        self.device = torch.device(device)
        self.tokens: dict[str, int] = {}

    @abstractmethod
    def trie_pass(self, rollouts: list[list[Call]]) -> Pass:
        """One pass over all of these calls as one trie."""

    @abstractmethod
    def loss(self, hidden: Tensor, targets: Tensor, weight: float) -> Tensor:
        """The loss of n tokens of one call.

        Args:
            hidden: the states that predict them, [n, hidden size].
            targets: the tokens, int64 [n].
            weight: of each.
        """

    @property
    def calls(self) -> list[Call]:
        return [call for calls in self.rollouts for call in calls]

    @property
    def key(self) -> Row:
        paths = [call.path for call in self.calls]
        n, unrolled = len(Trie.from_paths(paths)), sum(map(len, paths))
        sizes = {"n": n, "unrolled": unrolled, "token_ratio": unrolled / n}
        return {"update": self.update, "case": self.case, **sizes}

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
        to_device(model, self.device)
        return model.train()

    def call_pass(self, call: Call) -> Pass:
        """One pass over one call as a plain sequence."""
        ids = torch.tensor(call.path, device=self.device) % VOCABULARY

        def loss() -> Tensor:
            hidden = self.model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state
            return self.loss(hidden[0, call.start - 1 : -1], ids[call.start :], call.weight)

        return Pass(len(call.path), "sdpa", loss)

    def run(self, passes: list[Pass]) -> None:
        """Computes the gradient of the sum of the passes' losses."""
        self.model.zero_grad()
        for step in passes:
            self.model.set_attn_implementation(step.attention)
            step.loss().backward()

    def gradient(self) -> Tensor:
        """The gradients of all parameters as one vector."""
        return torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])

    @cached_property
    def expected(self) -> Tensor:
        """The gradient that every peer must have, computed call by call."""
        self.run(unrolled_passes(self))
        return self.gradient()

    def check(self, peer: str, result: Any, inputs: int) -> str | None:
        error = ((self.gradient() - self.expected).norm() / self.expected.norm()).item()
        return None if error <= self.tolerance else f"its gradient is off by {error:.1e}"

    def work(self, peer: str) -> Work:
        trie = Trie.from_paths([call.path for call in self.calls])
        pairs = int(trie.positions.sum()) + len(trie)
        layers: Any = self.model.base_model.layers
        weights = sum(weight.numel() for weight in layers.parameters())
        config = self.model.config
        attention = (FORWARD + BACKWARD) * config.num_attention_heads * config.head_dim * pairs
        return Work(6 * weights * len(trie) + config.num_hidden_layers * attention)

    def figures(self, peer: str, seconds: float) -> Row:
        return {"tokens": self.tokens[peer]}


class FineTuning(StepSetup):
    """SFT on one trajectory; a token that several calls share carries loss in the first of them."""

    def __init__(self, case: shapes.Case, device: str):
        owner = torch.full((len(case.trie),), case.trie.num_paths)
        nodes = [case.trie.path_nodes(i) for i in range(case.trie.num_paths)]
        for i in reversed(range(case.trie.num_paths)):
            owner[nodes[i]] = i
        starts = [max(1, int((owner[at] < i).sum())) for i, at in enumerate(nodes)]
        calls = [Call(path, start, 1.0) for path, start in zip(case.paths, starts, strict=True)]
        super().__init__("SFT", case.name, [calls], device)

    def trie_pass(self, rollouts: list[list[Call]]) -> Pass:
        calls = [call for calls in rollouts for call in calls]
        weights = [[0.0] * c.start + [c.weight] * (len(c.path) - c.start) for c in calls]
        trie = in_vocabulary(Trie.from_paths([call.path for call in calls], weights))
        layout = trie.layout(self.device)
        return Pass(len(trie), ATTENTION, lambda: trie_loss(self.model, trie, layout))

    def loss(self, hidden: Tensor, targets: Tensor, weight: float) -> Tensor:
        return weight * cross_entropy_sum(hidden, output_layer(self.model), targets)


class PolicyUpdate(StepSetup):
    """One P-GRPO step on a group; the weight of a completion token is its rollout's advantage."""

    def __init__(self, group: list[list[shapes.Call]], case: str, device: str):
        self.num_completion_tokens = sum(len(call.completion) for calls in group for call in calls)
        rollouts = [
            [Call(c.context + c.completion, len(c.context), advantage) for c in calls]
            for calls, advantage in zip(group, group_advantages(REWARDS[: len(group)]), strict=True)
        ]
        super().__init__("P-GRPO", case, rollouts, device)

    def trie_pass(self, rollouts: list[list[Call]]) -> Pass:
        [batch], _, _ = policy_group(
            [Rollout([], [], [*map(_completion, calls)], LimitCounts(), 0) for calls in rollouts],
            [calls[0].weight for calls in rollouts],
            max_tokens=2**31 - 1,
        )
        batch = replace(batch, trie=in_vocabulary(batch.trie))
        layout = batch.trie.layout(self.device)

        def loss() -> Tensor:
            current = trie_logprobs(self.model, batch.trie, layout, batch.sampled)
            return policy_loss(current, batch, PolicyConfig(), self.num_completion_tokens).loss

        return Pass(len(batch), ATTENTION, loss)

    def loss(self, hidden: Tensor, targets: Tensor, weight: float) -> Tensor:
        logprobs = token_logprobs(hidden, output_layer(self.model), targets).logprobs
        return -weight * logprobs.sum() / self.num_completion_tokens


def _completion(call: Call) -> Completion:
    context, tokens = call.path[: call.start], call.path[call.start :]
    unknown = [0.0] * len(tokens)
    return Completion((), context, tokens, unknown, unknown, "stop")


def in_vocabulary(trie: Trie) -> Trie:
    """The trie with its tokens modulo VOCABULARY and the same shape; siblings may be equal."""
    return replace(trie, tokens=trie.tokens % VOCABULARY)


def apart(calls: list[Call], common: int) -> list[Call]:
    """The calls, changed so that a trie shares only their first `common` tokens."""
    return [
        call._replace(
            path=call.path[:common]
            + [token % VOCABULARY + i * VOCABULARY for token in call.path[common:]]
        )
        for i, call in enumerate(calls)
    ]


def group_passes(setup: StepSetup) -> list[Pass]:
    return [setup.trie_pass(setup.rollouts)]


def rollout_passes(setup: StepSetup) -> list[Pass]:
    if len(setup.rollouts) == 1:
        raise Skip("it is one rollout")
    return [setup.trie_pass([calls]) for calls in setup.rollouts]


def unrolled_passes(setup: StepSetup) -> list[Pass]:
    return [setup.call_pass(call) for call in setup.calls]


def packed_passes(setup: StepSetup, common: int = 0) -> list[Pass]:
    """Passes of at most PACK_TOKENS tokens, whose calls share only their first `common` tokens."""
    calls = apart(setup.calls, common)
    sizes = [len(call.path) - common for call in calls]
    packs = pack(sizes, range(len(calls)), PACK_TOKENS - common)
    return [setup.trie_pass([[calls[i]] for i in p]) for p in packs]


def shared_prompt_passes(setup: StepSetup) -> list[Pass]:
    columns = zip(*(call.path for call in setup.calls), strict=False)
    common = sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, columns))
    return packed_passes(setup, common)
