"""The policy loss against PPO's objective over unrolled calls, each a sequence of its own."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from random import Random

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from tests.kernels.tries import node_prefixes
from tests.train.groups import Prefix, made_up_logprob, random_group
from threadweaver.generate.rollout import Completion, Rollout
from threadweaver.generate.weaver import LimitCounts
from threadweaver.model import (
    ATTENTION,
    OutputLayer,
    TokenLogprobs,
    token_logprobs,
    trie_hidden_states,
    trie_logprobs,
)
from threadweaver.model import loss as model_loss
from threadweaver.train.advantages import group_advantages
from threadweaver.train.config import ConfigError
from threadweaver.train.policy_batch import PolicyTrie, micro_batches, policy_group
from threadweaver.train.policy_loss import PolicyConfig, PolicyLoss, policy_loss

UNLIMITED = 10**6
REWARDS = [1.1, 0.0, 1.0, 0.0]


def tiny_model(seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            initializer_range=0.15,  # far from uniform, so that log-probabilities differ
        )
    )


class Batch:
    """Two groups of rollouts, and log-probabilities of their tokens under three other policies.

    `old` leaves the model's own by up to 0.6 either way, so that ratios leave both clip bounds;
    `generator` leaves `old` a little; `reference` is another model's.
    """

    def __init__(self, model: PreTrainedModel):
        random = Random(3)
        self.groups = [random_group(random, 4, max_tokens=150, max_depth=d) for d in (1, 2)]
        self.advantages = group_advantages(REWARDS)
        self.current: dict[Prefix, float] = {}
        reference = tiny_model(9)
        self.reference: dict[Prefix, float] = {}
        with torch.no_grad():
            for rollout in (rollout for group in self.groups for rollout in group):
                for prefix, logprob in unrolled_logprobs(model, rollout):
                    self.current[prefix] = logprob.item()
                for prefix, logprob in unrolled_logprobs(reference, rollout):
                    self.reference[prefix] = logprob.item()
        self.old = {p: c + 0.4 * (made_up_logprob(p) + 1.5) for p, c in self.current.items()}
        self.generator = {p: o + 0.2 * (made_up_logprob(p[1:]) + 1.5) for p, o in self.old.items()}
        for completion in (c for group in self.groups for r in group for c in r.completions):
            path = (*completion.context, *completion.tokens)
            starts = range(len(completion.context), len(path))
            completion.logprobs[:] = [self.generator[path[: i + 1]] for i in starts]

    @property
    def num_completion_tokens(self) -> int:
        return sum(rollout.num_sampled_tokens for group in self.groups for rollout in group)

    def tries(self, max_tokens: int = UNLIMITED) -> list[PolicyTrie]:
        groups = [policy_group(group, self.advantages, max_tokens) for group in self.groups]
        return [trie for group in groups for trie in group.tries]

    @property
    def whole(self) -> PolicyTrie:
        [trie] = micro_batches(self.tries(), UNLIMITED)
        return trie


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model(0)


@pytest.fixture(scope="module")
def batch(model) -> Batch:
    return Batch(model)


def unrolled_logprobs(model: PreTrainedModel, rollout: Rollout) -> list[tuple[Prefix, Tensor]]:
    """Of every sampled token, each call run as its own sequence by plain SDPA."""
    model.set_attn_implementation("sdpa")
    found = []
    for completion in rollout.completions:
        path = (*completion.context, *completion.tokens)
        logprobs = model(input_ids=torch.tensor([path])).logits[0].log_softmax(-1)
        for i in range(len(completion.context), len(path)):
            found.append((path[: i + 1], logprobs[i - 1, path[i]]))
    return found


def unrolled_loss(
    model: PreTrainedModel, batch: Batch, config: PolicyConfig, one_step: bool
) -> tuple[Tensor, int]:
    """PPO's objective, token by token as it is published, and whatever else is switched on; and
    the number of tokens at which its minimum is the clipped side."""
    total, num_clipped = torch.zeros(()), 0
    for group in batch.groups:
        for rollout, advantage in zip(group, batch.advantages, strict=True):
            for prefix, logprob in unrolled_logprobs(model, rollout):
                if one_step:
                    old, objective = logprob.detach(), advantage * logprob
                else:
                    old = torch.tensor(batch.old[prefix])
                    ratio = torch.exp(logprob - old)
                    clipped = torch.clip(ratio, 1 - config.clip_low, 1 + config.clip_high)
                    objective = torch.minimum(ratio * advantage, clipped * advantage)
                    num_clipped += int(clipped * advantage < ratio * advantage)
                if config.importance_cap is not None:
                    weight = torch.exp(old - batch.generator[prefix])
                    objective = objective * torch.clip(weight, max=config.importance_cap)
                total = total - objective
                if config.kl:
                    log_ratio = batch.reference[prefix] - logprob
                    total = total + config.kl * (torch.exp(log_ratio) - 1 - log_ratio)
    return total / batch.num_completion_tokens, num_clipped


def lookup(table: dict[Prefix, float], trie: PolicyTrie) -> Tensor:
    prefixes = node_prefixes(trie.trie)
    return torch.tensor([table[prefixes[at]] for at in trie.sampled])


def step(
    model: PreTrainedModel,
    batch: Batch,
    tries: list[PolicyTrie],
    config: PolicyConfig,
    one_step: bool = False,
) -> tuple[list[PolicyLoss], dict[str, Tensor]]:
    """What one step through tries gives, one backward pass for each: parts and gradients."""
    model.set_attn_implementation(ATTENTION)
    model.zero_grad()
    parts = []
    for trie in tries:
        current = trie_logprobs(
            model, trie.trie, trie.trie.layout(), trie.sampled, bool(config.entropy)
        )
        part = policy_loss(
            current,
            trie,
            config,
            batch.num_completion_tokens,
            None if one_step else lookup(batch.old, trie),
            lookup(batch.reference, trie) if config.kl else None,
        )
        part.loss.backward()
        parts.append(part)
    return parts, gradients(model)


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], relative: float = 1e-5) -> None:
    assert got.keys() == want.keys()
    for name, gradient in got.items():
        assert (gradient - want[name]).norm() <= relative * want[name].norm(), name


CONFIGS = {
    "plain": PolicyConfig(),
    "importance": PolicyConfig(importance_cap=1.1),
    "kl": PolicyConfig(kl=0.1),
}


def test_the_batch_shares_sampled_tokens_of_both_signs_and_clips_both(model, batch):
    trie = batch.whole
    [part], _ = step(model, batch, [trie], PolicyConfig())
    positive, negative = (weights[trie.sampled] for weights in trie.trie.columns.values())
    assert ((positive > 0) & (negative < 0)).sum() > 25
    ratio = (lookup(batch.current, trie) - lookup(batch.old, trie)).exp()
    for weights, outside in ((positive, ratio > 1.28), (negative, ratio < 0.8)):
        assert 20 < ((weights != 0) & outside).sum() < (weights != 0).sum() - 20
    assert 0.1 < part.clipped / trie.num_completion_tokens < 0.9


@pytest.mark.parametrize("one_step", [True, False], ids=["one step", "several steps"])
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_equal_those_of_the_unrolled_calls(model, batch, name, one_step):
    config = CONFIGS[name]
    [part], got = step(model, batch, [batch.whole], config, one_step=one_step)
    want, num_clipped = unrolled_loss(model, batch, config, one_step)
    assert part.loss.item() == pytest.approx(want.item(), rel=1e-5, abs=1e-7)
    assert part.clipped.item() == num_clipped
    model.zero_grad()
    want.backward()
    assert_same(got, gradients(model))


def test_at_ratio_one_the_clipped_form_has_the_gradient_of_the_exact_one(model, batch):
    _, want = step(model, batch, [batch.whole], PolicyConfig(), one_step=True)
    at_one = copy(batch)
    at_one.old = batch.current
    _, got = step(model, at_one, [batch.whole], PolicyConfig())
    assert_same(got, want)


@pytest.mark.parametrize("one_step", [True, False], ids=["one step", "several steps"])
def test_micro_batches_add_up_to_the_batch(model, batch, one_step):
    config = PolicyConfig(kl=0.1, importance_cap=1.1, entropy=0.01)
    [whole], want = step(model, batch, [batch.whole], config, one_step=one_step)
    rollouts = [rollout for group in batch.groups for rollout in group]
    largest = max(len(policy_group([r], [0.0], UNLIMITED).tries[0]) for r in rollouts)
    split = micro_batches(batch.tries(largest), largest)
    assert len(split) > 2
    parts, got = step(model, batch, split, config, one_step=one_step)
    assert_same(got, want)
    for name in ("loss", "clipped", "entropy", "kl", "mismatch"):
        total = sum(getattr(part, name).item() for part in parts)
        assert total == pytest.approx(getattr(whole, name).item(), rel=1e-5, abs=1e-7), name
    assert max(part.max_mismatch for part in parts) == pytest.approx(whole.max_mismatch.item())


def one_token(positive: float, negative: float) -> PolicyTrie:
    """One token, sampled by two rollouts with these advantages; the generator gave it exp(-1)."""
    rollouts = [
        Rollout([0], [1], [Completion((0,), [0], [1], [-1.0], [-1.0], "stop")], LimitCounts(), 1)
        for _ in range(2)
    ]
    [trie] = policy_group(rollouts, [positive, negative], UNLIMITED).tries
    return trie


def logprob_gradient(trie: PolicyTrie, ratio: float, **settings) -> float:
    logprob = torch.tensor([-1.0], requires_grad=True)
    old = torch.tensor([-1.0]) - torch.tensor([ratio]).log()
    current = TokenLogprobs(logprob, torch.zeros(1))
    policy_loss(current, trie, PolicyConfig(**settings), 1, old).loss.backward()
    assert logprob.grad is not None
    return logprob.grad.item()


@pytest.mark.parametrize(
    ("positive", "negative", "ratio", "want"),
    [
        (0.5, 0.0, 1.5, 0.0),  # good, and likelier already: cut
        (0.5, 0.0, 0.5, -0.5 * 0.5),
        (0.0, -0.5, 0.5, 0.0),  # bad, and less likely already: cut
        (0.0, -0.5, 1.5, 0.5 * 1.5),
        (0.5, -0.25, 1.5, 0.25 * 1.5),  # shared: only the good part is cut
        (0.5, -0.25, 0.5, -0.5 * 0.5),  # only the bad part
        (0.5, -0.25, 1.1, -0.25 * 1.1),
        (0.5, -0.25, 1.27, -0.25 * 1.27),
        (0.5, -0.25, 0.81, -0.25 * 0.81),
    ],
)
def test_the_clip_cuts_each_sign_on_its_own_side(positive, negative, ratio, want):
    got = logprob_gradient(one_token(positive, negative), ratio)
    assert got == pytest.approx(want, rel=1e-6)


def test_importance_weights_are_the_old_probability_over_the_generators_up_to_the_cap():
    trie = one_token(1.0, 0.0)
    plain = logprob_gradient(trie, 0.9)
    for cap, weight in ((5.0, 1 / 0.9), (1.05, 1.05)):
        got = logprob_gradient(trie, 0.9, importance_cap=cap)
        assert got == pytest.approx(weight * plain, rel=1e-6)


def test_the_kl_estimate_is_unbiased_and_zero_at_the_reference():
    policy, reference = (torch.randn(2, 50) * 2).log_softmax(-1)
    trie, config = one_token(0.0, 0.0), PolicyConfig(kl=1.0)

    def estimates(other: Tensor) -> Tensor:
        parts = [
            policy_loss(TokenLogprobs(p, torch.zeros(1)), trie, config, 2, None, q).kl / 2
            for p, q in zip(policy.split(1), other.split(1), strict=True)
        ]
        return torch.stack(parts)

    assert (estimates(reference) >= 0).all() and not estimates(policy).any()
    # Its mean over what the policy samples is the divergence itself.
    mean = (policy.exp() * estimates(reference)).sum()
    torch.testing.assert_close(mean, (policy.exp() * (policy - reference)).sum())


def test_the_entropy_bonus_raises_entropy_by_its_formula(batch):
    model = tiny_model(4)
    trie = batch.whole
    [with_bonus], got = step(model, batch, [trie], PolicyConfig(entropy=0.5), one_step=True)
    [without], plain = step(model, batch, [trie], PolicyConfig(), one_step=True)
    model.zero_grad()
    hidden_states = trie_hidden_states(model, trie.trie, trie.trie.layout())
    logits = model.lm_head(hidden_states[trie.trie.parents[trie.sampled]])
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    total = (trie.counts * entropy).sum()
    (-0.5 * total / batch.num_completion_tokens).backward()
    bonus = gradients(model)
    assert_same(got, {name: plain[name] + bonus[name] for name in plain})
    assert with_bonus.entropy.item() == pytest.approx(total.item(), rel=1e-5)
    assert without.entropy.item() == pytest.approx(total.item(), rel=1e-5)
    assert not without.entropy.requires_grad


def test_mismatch_is_between_generator_and_trainer_at_the_weights_of_sampling(model, batch):
    trie = batch.whole
    generator = lookup(batch.generator, trie)
    for one_step, own in ((True, batch.current), (False, batch.old)):
        [part], _ = step(model, batch, [trie], PolicyConfig(), one_step=one_step)
        off = (lookup(own, trie) - generator).abs()
        total = (trie.counts * off).sum()
        assert part.mismatch.item() == pytest.approx(total.item(), rel=1e-4)
        assert part.max_mismatch.item() == pytest.approx(off.max().item(), rel=1e-4)


@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_token_logprobs_in_pieces_equal_those_of_whole_logits(bias, entropy_gradient, monkeypatch):
    torch.manual_seed(0)
    hidden = torch.randn(67, 24, requires_grad=True)
    head = torch.nn.Linear(24, 90, bias=bias)
    targets = torch.randint(0, 90, (67,))
    weights = torch.randn(2, 67)

    def run(compute: Callable[[], TokenLogprobs]) -> tuple[TokenLogprobs, tuple[Tensor, ...]]:
        got = compute()
        total = weights[0] @ got.logprobs
        if entropy_gradient:
            total = total + weights[1] @ got.entropies
        return got, torch.autograd.grad(total, (hidden, *head.parameters()))

    def whole() -> TokenLogprobs:
        distribution = torch.distributions.Categorical(logits=head(hidden))
        return TokenLogprobs(distribution.log_prob(targets), distribution.entropy())

    want, want_grads = run(whole)
    for many in (2**24, 500):
        monkeypatch.setitem(model_loss.LOGITS_AT_ONCE, "cpu", many)
        got, grads = run(
            lambda: token_logprobs(hidden, OutputLayer(head), targets, entropy_gradient)
        )
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(grads, want_grads)
        assert got.entropies.requires_grad == entropy_gradient


def test_token_logprobs_under_autocast_are_float32_and_close():
    torch.manual_seed(0)
    hidden, targets = torch.randn(30, 24), torch.arange(30)
    head = OutputLayer(torch.nn.Linear(24, 90))
    want = token_logprobs(hidden, head, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = token_logprobs(hidden, head, targets)
    for x, y in zip(got, want, strict=True):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, y, atol=0.05, rtol=0.05)


def test_what_a_coefficient_needs_must_be_there():
    current = TokenLogprobs(torch.zeros(1, requires_grad=True), torch.zeros(1))
    with pytest.raises(ValueError, match=r"policy\.kl is 0\.1: it needs the reference"):
        policy_loss(current, one_token(1.0, 0.0), PolicyConfig(kl=0.1), 1)
    with pytest.raises(ValueError, match=r"policy\.entropy is 0\.1: it needs entropies with"):
        policy_loss(current, one_token(1.0, 0.0), PolicyConfig(entropy=0.1), 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("clip_low", 0.0),
        ("clip_low", 1.0),
        ("clip_high", -0.1),
        ("importance_cap", 0.0),
        ("kl", -1.0),
        ("entropy", -1.0),
    ],
)
def test_a_setting_out_of_range_is_named(name, value):
    with pytest.raises(ConfigError, match=rf"^policy\.{name} is {value}: it must be "):
        PolicyConfig(**{name: value})
