"""A stand-in for a model: random completions, remembered by the id of their request.

Its text holds tags only where a model that knows the format would write them, as elsewhere a
finished trajectory does not tell sampled tags from forced ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import NamedTuple

from hypothesis import settings
from hypothesis import strategies as st

from threadweaver.generate import Request, RequestId, Weaver
from threadweaver.generate.weaver import Reason
from threadweaver.trajectory import TAGS, Codec

VOCAB = {
    **{character: i for i, character in enumerate("0123456789abx:. \n")},
    **{tag: 100 + i for i, tag in enumerate(TAGS)},
    "<eos>": 120,
}
CODEC = Codec.from_vocab(VOCAB, eos_id=120)
EOS = 120

unhurried = settings(deadline=None, max_examples=100)


def ids(text: str) -> list[int]:
    return CODEC.encode(text)


class Completion(NamedTuple):
    tokens: list[int]
    reason: Reason


def texts(random: Random, symbols: Sequence[str], max_size: int) -> str:
    return "".join(random.choices(symbols, k=random.randint(0, max_size)))


class RandomModel:
    """Completes requests at random, the same again for the same id.

    Args:
        early: whether threads may end by EOS or by length, and the main line by length.
    """

    def __init__(self, random: Random, early: bool = True):
        self.completions: dict[RequestId, Completion] = {}
        self._random = random
        self._early = early

    def __call__(self, request: Request) -> Completion:
        if request.id not in self.completions:
            self.completions[request.id] = self._complete(request)
        return self.completions[request.id]

    def _complete(self, request: Request) -> Completion:
        random = self._random
        is_thread = VOCAB["</Thread>"] in request.stop_ids
        may_fork = VOCAB["</Outlines>"] in request.stop_ids
        text = "</Parallel>" if request.kind in ("join", "continue") else ""
        text += texts(random, "ab1: .\n", 6)
        # Threads fork less often, and a line less often the longer it is, so that rollouts end.
        weights = {
            "end": 3 + 3 * request.id[-1],
            "fork": (5 if is_thread else 20) * may_fork,
            "no outlines": may_fork,
            "cut": 0.3 * self._early,
            "eos": 0.3 * self._early * is_thread,
        }
        (action,) = random.choices(list(weights), list(weights.values()))
        if action == "fork":
            numbers = random.choices(["1", "2", "3", "1.2", "2"], k=random.randint(1, 4))
            outlines = "".join(f"<Outline>{n}:</Outline>" for n in numbers)
            text += f"<Parallel><Outlines>{outlines}</Outlines>"
        elif action == "no outlines":
            text += random.choice(NO_OUTLINES)
        elif action != "cut":
            if is_thread and not may_fork:
                text += texts(random, LITERAL_TAGS, 3)
            text += "</Thread>" if is_thread and action == "end" else "<eos>"
        tokens = ids(text)[: request.max_tokens]
        if action == "cut":
            tokens = tokens[: random.randint(0, len(tokens))]
        if tokens and tokens[-1] == EOS:
            return Completion(tokens, random.choice(["stop", "eos"]))
        if tokens and tokens[-1] in request.stop_ids:
            return Completion(tokens, "stop")
        return Completion(tokens, "length")


NO_OUTLINES = [
    "<Outlines></Outlines>",
    "<Parallel><Outlines><Outline>x:</Outline></Outlines>",
]
LITERAL_TAGS = ["a", *(tag for tag in TAGS if tag != "</Thread>")]

# Seeded, rather than drawn choice by choice: rollouts are large, and hypothesis favours small ones.
randoms = st.randoms(use_true_random=True)


@st.composite
def weaver_settings(draw: st.DrawFn) -> dict:
    return {
        "max_depth": draw(st.integers(1, 3)),
        "max_tokens": draw(st.sampled_from([3000, 500, 200, 50])),
        "max_threads": draw(st.integers(1, 4)),
        "max_thread_tokens": draw(st.sampled_from([None, 150, 12])),
        "max_blocks": draw(st.sampled_from([None, 3, 1])),
    }


def decoded(request: Request) -> str:
    return CODEC.decode(request.context)


def run(weaver: Weaver, *completions: str | tuple[str, Reason]) -> list[str]:
    """Completes the first open request with each text; returns the contexts that were asked for.

    A text ends in a stop token, or is a pair with another reason.
    """
    contexts = []
    for completion in completions:
        text, reason = (completion, "stop") if isinstance(completion, str) else completion
        request = weaver.requests()[0]
        contexts.append(decoded(request))
        weaver.complete(request, ids(text), reason)
    return contexts
