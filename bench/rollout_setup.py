"""The setup of bench.rollout: a case on a model, and the check of what a peer generated."""

from __future__ import annotations

from contextlib import ExitStack
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bench.rollout_cases import Case, Language, Trajectory
from bench.suite import Row, Setup, UsageError
from threadweaver.generate import Rollout
from threadweaver.generate.engine import Engine, Script
from threadweaver.generate.replay import script_of
from threadweaver.generate.settings import GenerationSettings
from threadweaver.generate.weaver import Mode
from threadweaver.model import trie_logprobs
from threadweaver.trajectory import path_lengths
from tw_kernels import Trie

CONTINUOUS = "transformers continuous batching"
# Requests whose log-probabilities are compared with the trainer's.
COMPARED = 4
# How far a greedy token's logit may be below the largest, in standard deviations of the logits:
# rounding reorders logits that are almost equal.
GREEDY_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


class Generated(NamedTuple):
    """What a peer generated.

    Attributes:
        responses: token ids, in the order of the requests.
        steps: number of forward passes.
        rollouts: our engine's record of the same; empty for other peers.
    """

    responses: list[list[int]]
    steps: int
    rollouts: list[Rollout]


class RolloutSetup(Setup):
    """A case on a model.

    Attributes:
        servers: ends the threads that peers have started.
        engines: peer of ours -> its engine.
        measured: peer -> entries of its row that do not depend on the time of a call.
    """

    def __init__(self, case: Case, language: Language):
        self.case, self.language = case, language
        self.servers = ExitStack()
        self.engines: dict[str, Engine] = {}
        self.measured: dict[str, Row] = {}

    @property
    def key(self) -> Row:
        return {
            "case": self.case.name,
            "requests": self.case.requests,
            "slots": self.case.slots,
            "model": self.language.name,
            "dtype": self.language.dtype,
        }

    @cached_property
    def trajectories(self) -> list[Trajectory]:
        return self.case.build(self.language)

    @cached_property
    def total_tokens(self) -> int:
        return sum(len(t.response) for t in self.trajectories)

    @cached_property
    def latency_speedup(self) -> float:
        """Tokens of the responses over tokens on their longest paths."""
        lengths = [path_lengths(t.response, self.language.codec) for t in self.trajectories]
        return self.total_tokens / sum(x.longest_path_tokens for x in lengths)

    def scripts(self, mode: Mode) -> list[tuple[Trajectory, GenerationSettings, Script]]:
        """The settings and the script by which an engine generates each trajectory.

        Raises:
            UsageError: it cannot generate one; names the source.
        """
        out = []
        for t in self.trajectories:
            ids, room = t.prompt + t.response, self.language.model.config.max_position_embeddings
            if len(ids) > room:
                raise UsageError(f"{t.source}: {len(ids)} tokens, over the model's context, {room}")
            settings = GenerationSettings(mode, max_tokens=len(t.response))
            try:
                script = script_of(ids, len(t.prompt), self.language.codec, settings)
            except ValueError as error:
                raise UsageError(f"{t.source}: {error}") from error
            out.append((t, settings, script))
        return out

    def check(self, peer: str, result: Generated, inputs: int) -> str | None:
        for i, (got, t) in enumerate(zip(result.responses, self.trajectories, strict=True)):
            if len(got) != len(t.response) or (peer != CONTINUOUS and got != t.response):
                return f"request {i} did not get its recorded response"
        if peer == CONTINUOUS:
            most = GREEDY_TOLERANCE[self.language.model.dtype]
            for i, got in enumerate(result.responses[:COMPARED]):
                if (below := self._below_best(self.trajectories[i].prompt, got)) > most:
                    return f"request {i} got a token {below:.1e} below the best, over {most:.0e}"
        self.measured[peer] = {"steps": result.steps}
        if result.rollouts:
            delta = mismatch(self.language.model, result.rollouts[:COMPARED])
            mean, most = delta.mean().item(), delta.max().item()
            self.measured[peer] |= {"mean_mismatch": mean, "max_mismatch": most}
        return None

    @torch.no_grad()
    def _below_best(self, prompt: list[int], response: list[int]) -> float:
        """The largest distance of a token's logit from the largest one, in the units of
        GREEDY_TOLERANCE."""
        model: Any = self.language.model
        model.set_attn_implementation("sdpa")
        ids = torch.tensor([prompt + response], device=model.device)
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
        chosen = logits.gather(1, ids[0, len(prompt) :, None])[:, 0]
        return ((logits.max(1).values - chosen) / logits.std(1)).max().item()

    def close(self) -> None:
        self.servers.close()

    def figures(self, peer: str, seconds: float) -> Row:
        row = {
            "tokens": self.total_tokens,
            "latency_speedup": self.latency_speedup,
            **self.measured[peer],
        }
        row["tokens_per_second"] = row["tokens"] / seconds
        row["ms_per_step"] = 1e3 * seconds / row["steps"]
        if peer in self.engines:
            shares = time_shares(self.engines[peer])
            row |= {f"{part}_share": share for part, share in shares.items()}
            row["shares"] = "/".join(f"{100 * share:.0f}" for share in shares.values())
        return row


def mismatch(model: PreTrainedModel, rollouts: list[Rollout]) -> Tensor:
    """|Δ log p| of every sampled token between engine and trie trainer, float32 [n]."""
    completions = [c for rollout in rollouts for c in rollout.completions if c.tokens]
    trie = Trie.from_paths([c.context + c.tokens for c in completions])
    at = [trie.path_nodes(i)[len(c.context) :] for i, c in enumerate(completions)]
    with torch.no_grad():
        expected = trie_logprobs(model, trie, trie.layout(model.device), torch.cat(at)).logprobs
    sampled = torch.tensor([p for c in completions for p in c.logprobs], device=expected.device)
    return (sampled - expected).abs()


def time_shares(engine: Engine) -> dict[str, float]:
    """Fractions of the time of all steps of an engine by activity; they add up to 1."""
    seconds = dict(engine.seconds)
    seconds["model"] -= seconds["attention"]
    total = sum(seconds.values())
    parts = ("model", "attention", "plan", "orchestration", "sampling")
    return {part: seconds[part] / total for part in parts}
