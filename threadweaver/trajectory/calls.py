"""The calls of a finished trajectory (docs/semantics.md, "Calls, tries, loss")."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Literal

from threadweaver.trajectory.codec import Codec
from threadweaver.trajectory.ids import token_ids
from threadweaver.trajectory.parser import Tag, Thread, parse

Span = tuple[int, int]


@dataclass(frozen=True)
class Call:
    """One request of the state machine and its completion.

    The path of a call, context then completion, is a chain of literal slices of the trajectory: one
    for a call of the main line; for a thread's, the main line up to the fork, then the thread.

    Attributes:
        ids: the trajectory, [T].
        spans: half-open slices of ids; the completion lies in the last one.
        completion_start: where in ids the completion begins; it ends with the last span.
    """

    ids: list[int] = field(repr=False)
    spans: tuple[Span, ...]
    completion_start: int

    @property
    def kind(self) -> Literal["sequential", "thread"]:
        """Whether it continues the main line or a thread (also between blocks nested in one)."""
        return "sequential" if len(self.spans) == 1 else "thread"

    @property
    def path(self) -> list[int]:
        """Ids of context and completion."""
        return list(chain.from_iterable(self.ids[start:end] for start, end in self.spans))

    @property
    def context(self) -> list[int]:
        """Ids of the request."""
        return self.path[: -self.completion_length]

    @property
    def completion(self) -> list[int]:
        """Ids that were decoded, the stop token included; never empty."""
        return self.ids[self.completion_start : self.spans[-1][1]]

    @property
    def completion_length(self) -> int:
        return self.spans[-1][1] - self.completion_start


def extract_calls(
    ids: Sequence[int], codec: Codec, prompt_length: int = 0, *, max_depth: int = 1
) -> list[Call]:
    """Every request that the state machine made for a finished trajectory, in order.

    Sequential call, threads 1..n, sequential call, …; a thread's nested calls follow in its place.
    A request with an empty completion, as at the end of a truncated trajectory, is left out. In a
    malformed trajectory stray tags are literal content.

    Args:
        ids: prompt and response, [T]: a list, NumPy array or 1-D tensor.
        prompt_length: how many of them are the prompt; tags there are literal text.
        max_depth: how deep blocks nest; 0 for a trajectory decoded in sequential mode.

    Raises:
        ValueError: prompt_length is not in [0, T].
    """
    ids, main = parse_ids(ids, codec, prompt_length, max_depth)
    return list(_calls(ids, codec, main, (), 0, prompt_length))


def parse_ids(
    ids: Sequence[int], codec: Codec, prompt_length: int, max_depth: int
) -> tuple[list[int], Thread]:
    """Ids as a list, and the main line of what follows the prompt."""
    ids = token_ids(ids, "trajectory")
    if not 0 <= prompt_length <= len(ids):
        raise ValueError(f"prompt_length is {prompt_length}, but there are {len(ids)} tokens")
    names = codec.tags
    tags = [
        Tag(names[id], i, i + 1)
        for i, id in enumerate(ids[prompt_length:], prompt_length)
        if id in names
    ]
    return ids, parse(tags, prompt_length, len(ids), max_depth)


def _calls(
    ids: list[int],
    codec: Codec,
    thread: Thread,
    fork_spans: tuple[Span, ...],
    line_start: int,
    completion_start: int,
) -> Iterator[Call]:
    """Calls of one line: fork_spans, then the thread's own ids from line_start on."""
    for fork in thread.forks:
        yield Call(ids, (*fork_spans, (line_start, fork.at)), completion_start)
        completion_start = fork.at
        if not fork.threads:
            continue
        spans = (*fork_spans, (line_start, fork.threads[0].start))
        for child in fork.threads:
            header_end = codec.header_end(ids, child.body_start, child.body_end)
            yield from _calls(ids, codec, child, spans, child.start, header_end)
        completion_start = _skip(codec.newline_ids, ids, fork.threads[-1].end)
    if completion_start < thread.end:
        yield Call(ids, (*fork_spans, (line_start, thread.end)), completion_start)


def _skip(expected: tuple[int, ...], ids: list[int], start: int) -> int:
    end = start + len(expected)
    return end if tuple(ids[start:end]) == expected else start
