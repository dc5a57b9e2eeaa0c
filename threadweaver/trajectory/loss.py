"""Which tokens of a trajectory carry loss (docs/semantics.md, "Calls, tries, loss")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

from threadweaver.trajectory.calls import extract_calls
from threadweaver.trajectory.codec import Codec
from tw_kernels import Trie, TrieBuilder

Loss = Literal["completions", "response", "sequential"]


class LossTrie(NamedTuple):
    """A trajectory as a trie, and what the token budget left of it.

    Attributes:
        trie: of the calls that were kept, a path each. Its column "weights" is 1 where a token
            carries loss and 0 elsewhere, however many calls share it.
        dropped_calls: how many calls the budget cut off the end.
    """

    trie: Trie
    dropped_calls: int


def loss_trie(
    ids: Sequence[int],
    codec: Codec,
    prompt_length: int,
    loss: Loss,
    *,
    max_tokens: int | None = None,
    max_depth: int = 1,
) -> LossTrie:
    """Unrolls a trajectory into the trie of its calls.

    Args:
        ids: prompt and response, [T].
        prompt_length: how many of them are the prompt; they never carry loss.
        loss: "completions": the tokens that calls completed. "response": those, and all tokens
            after the prompt on the joined path, as far as the last sequential call that is kept.
            "sequential": one path, the joined text as an ordinary sequence.
        max_tokens: budget for the trie; calls are dropped from the end until it fits.
        max_depth: how deep blocks nest.

    Raises:
        ValueError: nothing follows the prompt, the first call alone is over the budget, or `loss`
            is none of the three.
    """
    if loss not in get_args(Loss):
        raise ValueError(f"loss is {loss!r}: it must be one of {', '.join(get_args(Loss))}")
    if loss == "sequential":
        max_depth = 0
    calls = extract_calls(ids, codec, prompt_length, max_depth=max_depth)
    if not calls:
        raise ValueError(f"no token follows the {prompt_length} tokens of the prompt")
    builder = TrieBuilder("weights")
    kept = 0
    for call in calls:
        path = call.path
        if max_tokens is not None:
            num_tokens = builder.num_tokens + len(path) - builder.shared_prefix(path)
            if num_tokens > max_tokens:
                break
        start = len(path) - call.completion_length
        if loss == "response" and call.kind == "sequential":
            start = prompt_length
        builder.add(path, weights=[0.0] * start + [1.0] * (len(path) - start))
        kept += 1
    if not kept:
        raise ValueError(
            f"the first call alone has {len(calls[0].path)} tokens, over the budget of "
            f"{max_tokens}: raise the budget or leave this trajectory out"
        )
    trie = builder.build()
    trie.columns["weights"].clamp_(max=1)
    return LossTrie(trie, len(calls) - kept)
