"""The optimizer steps of P-GRPO (docs/semantics.md, "P-GRPO"), on tries of any origin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor
from transformers import PreTrainedModel

from threadweaver import ranks
from threadweaver.model import TokenLogprobs, trie_logprobs
from threadweaver.progress import Progress
from threadweaver.train.config import ConfigError
from threadweaver.train.policy_batch import PolicyTrie
from threadweaver.train.policy_loss import PolicyLoss, policy_loss
from threadweaver.train.policy_parts import Part
from threadweaver.train.schedule import constant_rate
from threadweaver.train.setup import build_passes
from threadweaver.train.sharding import Passes
from threadweaver.train.stages import RLConfig
from threadweaver.train.trainer import Record, Trainer
from tw_kernels import TrieLayout


class PolicyTrainer(Trainer[RLConfig]):
    """A trainer that learns from rollouts, wherever a subclass has them from.

    Attributes:
        reference: what runs the model that KL is measured from; None: there is no such penalty, or
            it is the trained model without its adapters. Set by `load_reference`.
        filler: what this rank runs while others have a micro-batch more; set likewise.
    """

    reference: Passes | None = None
    filler: PolicyTrie

    def load_reference(self) -> None:
        """Loads what the run started from, tags included, so that the first KL is 0.

        Raises:
            ConfigError: there is a penalty, and the run started from no stored model.
        """
        self.filler = PolicyTrie.filler(self.codec.eos_id)
        if not self.config.policy.kl or self.lora is not None:
            return
        if self.config.model.path is None:
            raise ConfigError(
                "policy.kl: the reference is the model at model.path: set it, or policy.kl 0"
            )
        reference, _ = build_passes(self.config, None, self.device)
        self.reference = reference.eval()

    def learn(self, parts: Sequence[Part], num_tokens: int) -> Record:
        """The optimizer steps of a batch.

        Args:
            num_tokens: of all completions of the batch, those of groups without signal included.
        """
        settings = self.config.optimization
        rate = constant_rate(
            self.steps_done, self.num_steps, settings.learning_rate, settings.warmup
        )
        losses: list[PolicyLoss] = []
        norms = []
        several = settings.updates > 1
        passes = sum(len(micros) + fillers for micros, fillers in parts) * (2 if several else 1)
        title = f"updating, step {self.steps_done + 1}"
        with Progress(self.console, title, passes, "passes") as progress:
            if several:
                old = self._old_logprobs(parts, progress)
            else:
                old = [[None] * len(micros) for micros, _ in parts]
            for (micros, fillers), old_logprobs in zip(parts, old, strict=True):
                self.copies.cast()
                step = [
                    self._backward(micro, before, num_tokens / settings.updates)
                    for micro, before in zip(progress.track(micros), old_logprobs, strict=True)
                ]
                for _ in progress.track(range(fillers)):
                    self._run_filler()
                tries = [micro.trie for micro in micros]
                sources = [micro.sources for micro in micros]
                norms.append(self.update(rate, [loss.loss for loss in step], tries, sources))
                losses += step
        # Those of groups with a signal, which alone are looked at.
        tokens = sum(micro.num_completion_tokens for micros, _ in parts for micro in micros)
        return {
            **_figures(losses, tokens, settings.updates),
            "gradient_norm": fmean(norms) if norms else 0.0,
            "learning_rate": rate,
            "updates": len(norms),
        }

    @torch.no_grad()
    def _old_logprobs(
        self, parts: Sequence[Part], progress: Progress
    ) -> Sequence[Sequence[Tensor | None]]:
        """Of each micro-batch of each part, by the weights before the first of several updates."""
        old = []
        for micros, fillers in parts:
            self.copies.cast()
            old.append([self._logprobs(self.passes, micro) for micro in progress.track(micros)])
            for _ in progress.track(range(fillers)):
                self._logprobs(self.passes, self.filler)
        return old

    def _backward(self, micro: PolicyTrie, old: Tensor | None, num_tokens: float) -> PolicyLoss:
        """Adds the gradient of a micro-batch; its loss."""
        current, reference = self._forward(micro)
        loss = policy_loss(current, micro, self.config.policy, num_tokens, old, reference)
        loss.loss.backward()
        return PolicyLoss(*(value.detach() for value in loss))

    def _run_filler(self) -> None:
        """The passes of `_backward` for nothing, while other ranks have a micro-batch."""
        current, _ = self._forward(self.filler)
        (0 * current.logprobs.sum()).backward()

    def _forward(self, micro: PolicyTrie) -> tuple[TokenLogprobs, Tensor | None]:
        """Log-probabilities with a gradient, and those of the reference if there is one."""
        reference = None
        if self.config.policy.kl:
            with torch.no_grad():
                reference = self._reference_logprobs(micro)
        with self.forward_pass():
            layout, needs_entropy = micro.trie.layout(self.device), self.config.policy.entropy > 0
            current = self.passes(_logprobs, micro, layout, needs_entropy)
        return current, reference

    def _logprobs(self, passes: Passes, micro: PolicyTrie) -> Tensor:
        with self.autocast():
            layout = micro.trie.layout(self.device)
            return passes(_logprobs, micro, layout, False).logprobs

    def _reference_logprobs(self, micro: PolicyTrie) -> Tensor:
        """Of the model that the run started from: without its adapters it is still that."""
        if self.lora is None:
            assert self.reference is not None
            return self._logprobs(self.reference, micro)
        with self.lora.adapters.disabled():
            return self._logprobs(self.passes, micro)


def _figures(losses: Sequence[PolicyLoss], tokens: int, updates: int) -> Record:
    """What a step reports of the losses of its micro-batches, on all ranks, which call it together.

    Args:
        tokens: of the completions that this rank's losses are of.
    """
    names = ("loss", "clipped", "entropy", "kl", "mismatch")
    sums = [math.fsum(float(getattr(loss, name)) for loss in losses) for name in names]
    loss, *sums, tokens_of_all = ranks.sums([*sums, tokens])
    clip_share, entropy, kl, mismatch = (x / max(tokens_of_all, 1) for x in sums)
    largest = max((float(loss.max_mismatch) for loss in losses), default=0.0)
    return {
        "loss": loss / updates,
        "clip_share": clip_share,
        "entropy": entropy,
        "kl": kl,
        "mismatch": mismatch,
        "max_mismatch": max(ranks.gather(largest)),
    }


def _logprobs(
    model: PreTrainedModel, micro: PolicyTrie, layout: TrieLayout, entropy_gradient: bool
) -> TokenLogprobs:
    """`trie_logprobs` of what was sampled, as tensors of their own: FSDP warns of views."""
    found = trie_logprobs(model, micro.trie, layout, micro.sampled, entropy_gradient)
    return TokenLogprobs(*(values.clone() for values in found))
