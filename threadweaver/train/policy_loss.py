"""The loss of P-GRPO over tries (docs/semantics.md, "P-GRPO"), and its settings.

Every sum runs over the sampled tokens of a trie. The loss is divided by the number of completion
tokens of the whole batch, so the micro-batches of a batch add up, gradients too. A token
that several rollouts sampled stands in the trie once: its P and M are the sums of their positive
and of their negative advantages, kept apart because a clip treats them differently.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from threadweaver.model import TokenLogprobs
from threadweaver.train.advantages import Advantage
from threadweaver.train.config import ConfigError
from threadweaver.train.policy_batch import PolicyTrie


@dataclass
class PolicyConfig:
    """How rewards move the policy.

    Args:
        advantage: mean: reward less the mean of its group; std: that divided by the standard
            deviation of the group.
        clip_low: where a batch takes several steps, the ratio to the sampling policy counts as at
            least 1 - clip_low for negative advantages.
        clip_high: and as at most 1 + clip_high for positive ones.
        importance_cap: weigh each token by its probability under the trainer over that under the
            generator, at most this; none: all tokens alike.
        kl: coefficient of the divergence from a reference model; 0: no reference model. Groups
            without a signal are left out of it, and of the entropy.
        entropy: coefficient of the entropy, as a bonus.
    """

    advantage: Advantage = "mean"
    clip_low: float = 0.2
    clip_high: float = 0.28
    importance_cap: float | None = None
    kl: float = 0.0
    entropy: float = 0.0

    def __post_init__(self):
        for name, valid, rule in (
            ("clip_low", 0 < self.clip_low < 1, "above 0 and below 1"),
            ("clip_high", self.clip_high > 0, "above 0"),
            ("importance_cap", self.importance_cap is None or self.importance_cap > 0, "above 0"),
            ("kl", self.kl >= 0, "at least 0"),
            ("entropy", self.entropy >= 0, "at least 0"),
        ):
            if not valid:
                raise ConfigError(f"policy.{name} is {getattr(self, name)}: it must be {rule}")


class PolicyLoss(NamedTuple):
    """A micro-batch's share of the loss of its batch, and sums for its metrics; float32 scalars.

    Only the loss has a gradient. All but max_mismatch add up over micro-batches; a metric is a sum
    divided by PolicyTrie.num_completion_tokens, added up likewise: a mean over the tokens that it
    was computed on.

    Attributes:
        loss: to be minimised.
        clipped: completion tokens whose gradient the clip cut.
        entropy: sum over completion tokens, in nats.
        kl: sum over completion tokens, estimated; zero without a reference.
        mismatch: sum over completion tokens of |log p(trainer) - log p(generator)|, the trainer's
            with the weights that the batch was sampled with.
        max_mismatch: its maximum.
    """

    loss: Tensor
    clipped: Tensor
    entropy: Tensor
    kl: Tensor
    mismatch: Tensor
    max_mismatch: Tensor


def policy_loss(
    current: TokenLogprobs,
    batch: PolicyTrie,
    config: PolicyConfig,
    num_completion_tokens: float,
    old_logprobs: Tensor | None = None,
    reference_logprobs: Tensor | None = None,
) -> PolicyLoss:
    """The loss of one micro-batch.

    With log p the current log-probability, N the number of completion tokens, and the sum over
    sampled tokens:

        one step to a batch    - sum (P + M) log p / N
        several steps          - sum (P min(ratio, 1 + clip_high) + M max(ratio, 1 - clip_low)) / N,
                               ratio = exp(log p - old log p)

    The second is PPO's clipped objective (arXiv 1707.06347, eq. 7) summed over the rollouts that
    sampled a token, with the two bounds apart (DAPO, arXiv 2503.14476). At ratio 1 both have the
    same gradient.

    Args:
        current: of the tokens batch.sampled under the weights to be trained, with a gradient.
            Entropies need one only if config.entropy is not 0.
        num_completion_tokens: of the whole batch, counted for each rollout.
        old_logprobs: float32 [n], the trainer's with the weights that the batch was sampled with;
            None if this is the only step of the batch, so that `current` is just that.
        reference_logprobs: float32 [n], of the reference model.

    Raises:
        ValueError: config.kl is not 0 and there are no reference_logprobs, or config.entropy is not
            0 and the entropies have no gradient.
    """
    logprobs, entropies = current
    if config.kl and reference_logprobs is None:
        raise ValueError(f"policy.kl is {config.kl}: it needs the reference model's logprobs")
    if config.entropy and not entropies.requires_grad:
        raise ValueError(f"policy.entropy is {config.entropy}: it needs entropies with a gradient")
    device = logprobs.device
    positive = batch.trie.columns["positive_advantages"][batch.sampled].to(device)
    negative = batch.trie.columns["negative_advantages"][batch.sampled].to(device)
    counts = batch.counts.to(device)
    generator = batch.generator_logprobs.to(device)
    if old_logprobs is None:
        old = logprobs.detach()
        objective = (positive + negative) * logprobs
        clipped = counts.new_zeros(())
    else:
        old = old_logprobs
        lowest, highest = 1 - config.clip_low, 1 + config.clip_high
        ratio = (logprobs - old).exp()
        objective = positive * ratio.clamp(max=highest) + negative * ratio.clamp(min=lowest)
        clipped = (batch.positive_counts.to(device) * (ratio > highest)).sum()
        clipped = clipped + (batch.negative_counts.to(device) * (ratio < lowest)).sum()
    if config.importance_cap is not None:
        objective = objective * (old - generator).exp().clamp(max=config.importance_cap)
    entropy = (counts * entropies).sum()
    loss = -objective.sum() - config.entropy * entropy
    kl = loss.new_zeros(())
    if reference_logprobs is not None:
        kl = (counts * _k3(logprobs, reference_logprobs)).sum()
        loss = loss + config.kl * kl
    mismatch = (old - generator).abs()
    return PolicyLoss(
        loss=loss / num_completion_tokens,
        clipped=clipped,
        entropy=entropy.detach(),
        kl=kl.detach(),
        mismatch=(counts * mismatch).sum(),
        max_mismatch=mismatch.max(),
    )


def _k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Estimates KL(policy || reference) token by token, never below 0 (Schulman's k3)."""
    difference = reference - logprobs
    return difference.expm1() - difference
