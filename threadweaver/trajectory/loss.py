"""Which tokens of a trajectory carry loss, as weighted paths (SPEC, "Calls, tries, loss")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

from threadweaver.trajectory.calls import Call, Span, extract_calls
from threadweaver.trajectory.codec import Codec

Loss = Literal["completions", "response"]


class LossPaths(NamedTuple):
    """Paths and weights as Trie.from_paths takes them, and what the token budget left of them.

    Attributes:
        paths: ids of each call that was kept, context and completion.
        weights: for each path as many numbers. Over all paths through a token of the trie they add
            up to 1 if it carries loss and to 0 if not, so that a shared token counts once.
        num_tokens: size of the trie of these paths.
        dropped_calls: how many calls the budget cut off the end.
    """

    paths: list[list[int]]
    weights: list[list[float]]
    num_tokens: int
    dropped_calls: int


def loss_paths(
    ids: Sequence[int],
    codec: Codec,
    prompt_length: int,
    loss: Loss,
    *,
    max_tokens: int | None = None,
    max_depth: int = 1,
) -> LossPaths:
    """Unrolls a trajectory into the weighted paths of its trie.

    Args:
        ids: prompt and response, [T].
        prompt_length: how many of them are the prompt; they never carry loss.
        loss: "completions": the tokens that calls completed. "response": those, and all tokens
            after the prompt on the joined path, as far as the last sequential call that is kept.
        max_tokens: budget for the trie; calls are dropped from the end until it fits.
        max_depth: how deep blocks nest.

    Raises:
        ValueError: nothing follows the prompt, the first call alone is over the budget, or `loss`
            is neither of the two.
    """
    if loss not in get_args(Loss):
        raise ValueError(f"loss is {loss!r}: it must be one of {', '.join(get_args(Loss))}")
    calls = extract_calls(ids, codec, prompt_length, max_depth=max_depth)
    if not calls:
        raise ValueError(f"no token follows the {prompt_length} tokens of the prompt")
    trie = _TrieNodes(calls[0].ids)
    paths, weights, num_tokens = [], [], 0
    with_loss: set[int] = set()
    for call in calls:
        nodes = trie.walk(call.spans)
        if max_tokens is not None and len(trie) > max_tokens:
            break
        num_tokens = len(trie)
        paths.append(call.path)
        weights.append(_weights(call, nodes, prompt_length, loss, with_loss))
    if not paths:
        raise ValueError(
            f"the first call alone has {len(trie)} tokens, over the budget of {max_tokens}: "
            "raise the budget or leave this trajectory out"
        )
    return LossPaths(paths, weights, num_tokens, len(calls) - len(paths))


def _weights(
    call: Call, nodes: list[int], prompt_length: int, loss: Loss, with_loss: set[int]
) -> list[float]:
    """Weights of one call's path; the first path through a token carries the token's loss."""
    start, end = call.spans[-1]
    first = call.completion_start
    if loss == "response" and call.kind == "sequential":
        first = prompt_length
    weights = [0.0] * (sum(e - s for s, e in call.spans[:-1]) + first - start)
    for node in nodes[first - start : end - start]:
        weights.append(0.0 if node in with_loss else 1.0)
        with_loss.add(node)
    return weights


class _TrieNodes:
    """Numbers the nodes of the trie of calls, walking every line of the trajectory only once.

    The calls of a line share its literal prefix, so a line is known by where it left the others.
    Nodes are told apart by their parent and token, as in any trie: threads share "<Thread>\\n".
    """

    def __init__(self, ids: list[int]):
        self._ids = ids
        self._children: dict[tuple[int, int], int] = {}
        self._lines: dict[tuple[tuple[Span, ...], int], list[int]] = {}

    def __len__(self) -> int:
        return len(self._children)

    def walk(self, spans: tuple[Span, ...]) -> list[int]:
        """Nodes of the line that the last span runs along, from its start to its end or further."""
        *fork, (start, end) = spans
        line = self._lines.setdefault((tuple(fork), start), [])
        if line:
            node = line[-1]
        elif fork:
            fork_start, fork_end = fork[-1]
            node = self.walk(tuple(fork))[fork_end - fork_start - 1]
        else:
            node = -1
        for token in self._ids[start + len(line) : end]:
            node = self._children.setdefault((node, token), len(self._children))
            line.append(node)
        return line
