"""The text of a generation as it grows, over random rollouts decoded token by token."""

from __future__ import annotations

from itertools import pairwise
from random import Random

from hypothesis import given
from rollouts import CODEC, EOS, RandomModel, ids, randoms, unhurried, weaver_settings

from threadweaver.generate import Completion, GenerationSettings, Weaver
from threadweaver.generate.engine import Generation
from threadweaver.generate.scheduler import Family, Sequence
from threadweaver.generate.transcript import pieces, settled, transcript

PROMPT = ids("1ab:")


class Rollout:
    """A Generation that random completions come in for, a token at a time in any order."""

    def __init__(self, random: Random, limits: dict, early: bool = True):
        self.weaver = Weaver(PROMPT, CODEC, **limits)
        self.limit = self.weaver.requests()[0].max_tokens
        self.generation = Generation(
            PROMPT, GenerationSettings(**limits), 0, self.weaver, 0, Family(len(PROMPT))
        )
        self._random = random
        self._model = RandomModel(random, early)
        self._open()

    def _open(self) -> None:
        for request in self.weaver.requests():
            if request.id not in self.generation.open:
                self.generation.open[request.id] = Sequence(
                    (0, *request.id), list(request.context), Family(0), request=request, key=0
                )

    def step(self) -> None:
        sequence = self._random.choice(list(self.generation.open.values()))
        request = sequence.request
        tokens, reason = self._model(request)
        done = len(sequence.completion)
        if done < len(tokens):
            sequence.ids.append(tokens[done])
            return
        del self.generation.open[request.id]
        self.generation.completions[request.id] = Completion(
            request.id, request.context, tokens, [], [], reason
        )
        self.weaver.complete(request, tokens, reason)
        self._open()


def text_of(response: list[int]) -> list[int]:
    return response[:-1] if response[-1:] == [EOS] else response


@unhurried
@given(randoms, weaver_settings())
def test_settled_text_is_the_beginning_of_the_response_and_only_grows(random, limits):
    rollout = Rollout(random, limits)
    seen = []
    while not rollout.weaver.done:
        rollout.step()
        seen.append(settled(rollout.generation, CODEC)[: rollout.limit])
    response = text_of(rollout.weaver.response)
    assert seen[-1] == response
    for earlier, later in pairwise(seen):
        assert later[: len(earlier)] == earlier
    assert all(response[: len(part)] == part for part in seen)


@unhurried
@given(randoms, weaver_settings())
def test_a_transcript_holds_every_token_that_was_decoded(random, limits):
    rollout = Rollout(random, limits)
    for _ in range(random.randint(0, 200)):
        if rollout.weaver.done:
            break
        rollout.step()
    generation = rollout.generation
    if generation.weaver.done:
        assert transcript(generation, CODEC) == text_of(generation.weaver.response)
        return
    whole = transcript(generation, CODEC)
    parts = pieces(generation, CODEC)
    assert [id for part in parts for id in part.ids] == whole
    tokens = {p.request: p.tokens for p in parts}
    assert {p.request for p in parts if p.is_open} == generation.open.keys()
    for id, sequence in generation.open.items():
        assert tokens[id] == text_of(sequence.completion)
    for id, completion in generation.completions.items():
        assert tokens[id] == text_of(completion.tokens)
    assert whole[: len(settled(generation, CODEC))] == settled(generation, CODEC)


def test_without_early_ends_the_transcript_is_the_response_to_be():
    for seed in range(20):
        rollout = Rollout(Random(seed), {"max_tokens": 3000, "max_depth": 2}, early=False)
        last = []
        while not rollout.weaver.done:
            last = transcript(rollout.generation, CODEC)
            rollout.step()
        response = text_of(rollout.weaver.response)
        assert response[: len(last)] == last
