"""Groups of rollouts of one prompt, by the state machine and random completions.

Rollouts of a group share sampled prefixes: some have the first call of an earlier one, and some of
its threads, or all of it; texts of few letters do the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from tests.generate.rollouts import CODEC, RandomModel, ids
from threadweaver.generate import Weaver
from threadweaver.generate.rollout import Completion, Rollout

Prefix = tuple[int, ...]

PROMPT = ids("<Outlines>a1\n")


def made_up_logprob(prefix: Prefix) -> float:
    """Some log-probability of the last token of a prefix, always the same."""
    return -(hash(prefix) % 997) / 300


def rollout(
    model: RandomModel, logprob: Callable[[Prefix], float] = made_up_logprob, **settings
) -> Rollout:
    weaver = Weaver(PROMPT, CODEC, **settings)
    completions = []
    while not weaver.done:
        request = weaver.requests()[0]
        tokens, reason = model(request)
        weaver.complete(request, tokens, reason)
        context = request.context
        logprobs = [logprob((*context, *tokens[: i + 1])) for i in range(len(tokens))]
        completions.append(Completion(request.id, context, tokens, logprobs, logprobs, reason))
    completions.sort(key=lambda completion: completion.request)
    return Rollout(PROMPT, weaver.response, completions, weaver.limits, decode_steps=0)


def random_group(random: Random, size: int, **settings) -> list[Rollout]:
    models: list[RandomModel] = []
    rollouts = []
    for _ in range(size):
        model = RandomModel(random)
        if models and random.random() < 0.8:
            earlier = random.choice(models).completions
            whole = random.random() < 0.2
            for request, completion in earlier.items():
                # A later request of the main line may have less room here.
                in_first_block = request == (0,) or (len(request) == 3 and request[::2] == (0, 0))
                if whole or request == (0,) or (in_first_block and random.random() < 0.5):
                    model.completions[request] = completion
        rollouts.append(rollout(model, **settings))
        models.append(model)
    return rollouts


def sampled_prefixes(completion: Completion) -> list[Prefix]:
    """A token of a trie is the prefix that ends in it."""
    path = (*completion.context, *completion.tokens)
    return [path[: i + 1] for i in range(len(completion.context), len(path))]
