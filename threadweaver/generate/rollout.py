"""The record of one rollout, which evaluation and training read."""

from __future__ import annotations

from dataclasses import dataclass, field

from threadweaver.generate.weaver import LimitCounts, Reason, RequestId


@dataclass(frozen=True)
class Completion:
    """The tokens decoded for one request of a rollout.

    Attributes:
        request: its id in the Weaver.
        context: ids of the request, [T].
        tokens: ids that were decoded, the stop token included, [n]; empty if there was no room.
        logprobs: log-probability of each token under the model, untempered, [n].
        sampled_logprobs: of each token under the distribution it was drawn from, after temperature
            and truncation, [n]; 0 for a greedy choice.
        reason: what ended it.
    """

    request: RequestId
    context: list[int] = field(repr=False)
    tokens: list[int]
    logprobs: list[float] = field(repr=False)
    sampled_logprobs: list[float] = field(repr=False)
    reason: Reason


@dataclass(frozen=True)
class RolloutCounts:
    """What figures need of a rollout beside its text; the fields of `Rollout`."""

    num_sampled_tokens: int
    limits: LimitCounts
    decode_steps: int
    seconds: float


@dataclass(frozen=True)
class Rollout:
    """One finished response to one prompt.

    Attributes:
        prompt: ids of the prompt.
        response: ids after the prompt, joined; the end token included if it was decoded.
        completions: by request id, which is the order of the text.
        limits: how often a limit of the Weaver ended something.
        decode_steps: engine steps that computed tokens of it, prefill included; 0 if it comes from
            a server, which does not say.
        seconds: from the start of the first of them to the end of the last, by the clock.
    """

    prompt: list[int] = field(repr=False)
    response: list[int]
    completions: list[Completion]
    limits: LimitCounts
    decode_steps: int
    seconds: float = field(default=0.0, compare=False)

    @property
    def num_sampled_tokens(self) -> int:
        return sum(len(completion.tokens) for completion in self.completions)

    @property
    def counts(self) -> RolloutCounts:
        return RolloutCounts(self.num_sampled_tokens, self.limits, self.decode_steps, self.seconds)
