"""The fork-join state machine of one response (docs/semantics.md, "State machine"), without I/O.

Its driver (an engine, a test, a remote server) decodes the open requests in any order and hands
back the completions.

    weaver = Weaver(prompt_ids, codec, max_tokens=1500)
    while not weaver.done:
        for request in weaver.requests():
            weaver.complete(request, *decode(request.context, request.stop_ids, request.max_tokens))
    weaver.response

Sharing of KV (docs/architecture.md, facts 6 and 7): the *path* of a request is its context and
completion. Every request but the first extends the whole path of one closed request by the forced
tokens between them; so page tables are forked and adopted without comparing ids.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, get_args

from threadweaver.trajectory import Codec
from threadweaver.trajectory.ids import token_ids
from threadweaver.trajectory.tags import MAX_OUTLINES

Mode = Literal["parallel", "sequential"]
Reason = Literal["stop", "eos", "length"]

# Request k of the main line is (k,); request m of the t-th thread that request r opened is
# (*r, t, m), all counted from 0. An id depends on the decoded tokens and not on the schedule, and
# ids sort in the order of the text: a request before all that extend it.
RequestId = tuple[int, ...]

_OUTLINE_NUMBER = re.compile(r"<Outline>\s*([0-9]+(?:\.[0-9]+)*)\s*:")


@dataclass(frozen=True, eq=False)
class Request:
    """Something to decode. Two requests are equal only if they are the same object.

    Attributes:
        id: unique within its Weaver, and independent of the schedule.
        context: ids to continue from, [T]; not to be modified.
        stop_ids: ids that end the completion, and stand at its end.
        max_tokens: most tokens of the completion, the stop token included; at least 1.
        kind: how it extends the path of its parent:
            "prompt": it has no parent, and its context is the prompt;
            "thread": it forks the path, as the other threads of the block do;
            "continue": it continues its line, since no outline asked for a thread;
            "join": it continues the line that forked. The parent is the last request of thread 1,
                whose path runs through the fork; the tokens of the other threads follow it.
        parent: id of the closed request whose path it extends; None for the first. The context
            begins with that whole path; the rest of it, maybe nothing, is forced.
    """

    id: RequestId
    context: list[int] = field(repr=False)
    stop_ids: list[int]
    max_tokens: int
    kind: Literal["prompt", "thread", "continue", "join"]
    parent: RequestId | None


@dataclass
class LimitCounts:
    """How often a limit ended something.

    Attributes:
        response: 1 if the response was ended or cut by its length.
        threads: threads ended by their own length, or for want of room in the response.
        outlines: outlines that got no thread, as their block was full.
        blocks: outlines that opened no block, which ended their line.
    """

    response: int = 0
    threads: int = 0
    outlines: int = 0
    blocks: int = 0


class Weaver:
    """One response to one prompt.

    Args:
        prompt_ids: [T], T >= 1: a list, NumPy array or 1-D tensor. Its tags are literal text.
        max_tokens: most tokens of the response, on any path and joined; a response that a join
            makes longer is closed and truncated.
        mode: "sequential" runs the model with no orchestration: one request, until EOS.
        max_depth: how deep blocks nest. Below it a thread stops at </Outlines> too, and may open a
            block of its own.
        max_threads: most threads of a block; outlines beyond them get none.
        max_thread_tokens: most tokens of a thread, blocks nested in it included.
        max_blocks: most blocks on the main line, and on each thread by itself, so that no thread
            depends on how fast another is.

    Attributes:
        limits: how often a limit ended something.

    Raises:
        ValueError: the prompt is empty or holds what is no token id, a setting is out of range, or
            the codec has no newline to write around threads.
    """

    def __init__(
        self,
        prompt_ids: Iterable[int],
        codec: Codec,
        max_tokens: int,
        *,
        mode: Mode = "parallel",
        max_depth: int = 1,
        max_threads: int = MAX_OUTLINES,
        max_thread_tokens: int | None = None,
        max_blocks: int | None = None,
    ):
        if mode not in get_args(Mode):
            raise ValueError(f"mode is {mode!r}: it must be one of {', '.join(get_args(Mode))}")
        for name, value in (
            ("max_tokens", max_tokens),
            ("max_depth", max_depth),
            ("max_threads", max_threads),
            ("max_thread_tokens", max_thread_tokens),
            ("max_blocks", max_blocks),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: it must be at least 1")
        prompt = token_ids(prompt_ids, "prompt")
        if not prompt:
            raise ValueError("the prompt is empty: there is nothing to continue from")
        if mode == "parallel" and not codec.newline_ids:
            raise ValueError(
                "the codec has no id for a newline, which parallel mode writes around threads: "
                'add "\\n" to the vocabulary, or use mode="sequential"'
            )
        self.limits = LimitCounts()
        self._codec = codec
        self._newline = list(codec.newline_ids)
        self._outlines_end = codec.tag_ids["</Outlines>"]
        self._thread_end = codec.tag_ids["</Thread>"]
        self._parallel_end = codec.tag_ids["</Parallel>"]
        self._max_threads = max_threads
        self._max_thread_tokens = max_thread_tokens
        self._max_blocks = max_blocks
        self._open: dict[RequestId, tuple[Request, _Line]] = {}
        levels = max_depth if mode == "parallel" else 0
        self._main = _Line((), prompt, len(prompt), max_tokens, levels, block=None)
        self._request(self._main, "prompt", None)

    @property
    def done(self) -> bool:
        return not self._open

    @property
    def response(self) -> list[int]:
        """Ids after the prompt; before `done`, those of the main line so far."""
        return self._main.context[self._main.start :][: self._main.limit]

    def requests(self) -> list[Request]:
        """The open requests, by id; each stays open until it is completed."""
        return [self._open[id][0] for id in sorted(self._open)]

    def retained(self) -> set[RequestId]:
        """The closed requests whose path a join may still extend: threads 1 that wait for others.

        The path of any other closed request is not needed once the requests have been opened that
        followed from it.
        """
        blocks = set()
        for _, line in self._open.values():
            while line.block is not None:
                blocks.add(line.block)
                line = line.block.line
        firsts = (block.threads[0] for block in blocks if not block.is_last)
        return {line.request_id for line in firsts if line.closed}

    def complete(self, request: Request, tokens: Iterable[int], reason: Reason) -> None:
        """Takes the completion of an open request, and opens the requests that follow.

        Args:
            tokens: ids, the stop token included, [n] with n <= request.max_tokens.
            reason: "stop" if they end in one of the stop ids, "eos" if in one of the codec's end
                ids, "length" if the decoding had to end here.

        Raises:
            ValueError: the request is not open here, or tokens and reason cannot be its completion.
                Nothing has changed then.
        """
        opened, line = self._open.get(request.id, (None, self._main))
        if opened is not request:
            state = "the response is done" if self.done else "it is closed, or another Weaver's"
            raise ValueError(f"request {request.id} is not open: {state}")
        tokens = token_ids(tokens, f"request {request.id}")
        self._check(request, tokens, reason)
        del self._open[request.id]
        # A new list, since the request keeps its context.
        line.context = line.context + tokens
        stop = tokens[-1] if tokens and tokens[-1] in request.stop_ids else None
        if stop == self._outlines_end:
            self._fork(line)
        elif stop == self._thread_end and line.block is not None:
            line.closed = True
            self._join(line.block)
        elif stop in self._codec.end_ids:
            if line.block is not None:
                line.context.pop()
            self._end(line)
        else:
            self._end_by_length(line)

    def _check(self, request: Request, tokens: list[int], reason: Reason) -> None:
        name = f"request {request.id}"
        if reason not in get_args(Reason):
            raise ValueError(
                f"{name}: reason is {reason!r}, it must be one of {', '.join(get_args(Reason))}"
            )
        if len(tokens) > request.max_tokens:
            raise ValueError(
                f"{name}: {len(tokens)} tokens came back, max_tokens is {request.max_tokens}"
            )
        if reason != "length":
            ends = request.stop_ids if reason == "stop" else [*self._codec.end_ids]
            if not tokens or tokens[-1] not in ends:
                raise ValueError(
                    f"{name}: reason is {reason!r}, but the tokens end in {tokens[-1:]}, "
                    f"which is none of {ends}"
                )
        if not set(request.stop_ids).isdisjoint(tokens[:-1]):
            raise ValueError(f"{name}: the tokens go on after one of its stop ids")

    def _request(
        self,
        line: _Line,
        kind: Literal["prompt", "thread", "continue", "join"],
        parent: RequestId | None,
    ) -> None:
        stop_ids = [*self._codec.end_ids]
        if line.block is not None:
            stop_ids.insert(0, self._thread_end)
        if line.levels > 0:
            stop_ids.insert(0, self._outlines_end)
        line.request_id = (*line.id, line.num_requests)
        line.num_requests += 1
        request = Request(
            id=line.request_id,
            context=line.context,
            stop_ids=stop_ids,
            max_tokens=line.room,
            kind=kind,
            parent=parent,
        )
        self._open[request.id] = request, line

    def _fork(self, line: _Line) -> None:
        """After </Outlines>: a request for each outline, or the line goes on or ends."""
        numbers = self._outline_numbers(line)
        if not numbers:
            if line.room > 0:
                self._request(line, "continue", line.request_id)
            else:
                self._end_by_length(line)
            return
        if line.num_blocks == self._max_blocks:
            self.limits.blocks += 1
            self._end(line)
            return
        self.limits.outlines += max(0, len(numbers) - self._max_threads)
        headers = [
            self._newline + self._codec.encode(f"<Thread>\n{number}:")
            for number in numbers[: self._max_threads]
        ]
        # The room of a thread does not depend on the other threads, nor on the schedule.
        room = line.room - max(map(len, headers))
        if room <= 0:
            self._end_by_length(line)
            return
        if self._max_thread_tokens is not None:
            room = min(room, self._max_thread_tokens)
        line.num_blocks += 1
        block = _Block(line)
        for t, header in enumerate(headers):
            context = line.context + header
            id = (*line.request_id, t)
            thread = _Line(id, context, len(context), room, line.levels - 1, block)
            block.threads.append(thread)
            self._request(thread, "thread", line.request_id)

    def _outline_numbers(self, line: _Line) -> list[str]:
        """Numbers of the outlines since the last <Outlines> that the line holds itself."""
        start = self._codec.tag_ids["<Outlines>"]
        own = line.context[line.start :]
        if start not in own:
            return []
        last = own[::-1].index(start) + 1
        return list(dict.fromkeys(_OUTLINE_NUMBER.findall(self._codec.decode(own[-last:]))))

    def _join(self, block: _Block) -> None:
        """After the last thread of the block: the line that forked goes on, or ends."""
        if not all(thread.closed for thread in block.threads):
            return
        line, first = block.line, block.threads[0]
        start = len(line.context) + len(self._newline)
        line.context = line.context + self._newline
        for thread in block.threads:
            line.context += thread.context[start:]
        # They refer to the block: without a cycle, what is done with is freed at once.
        block.threads.clear()
        if block.is_last:
            line.context += [*self._newline, self._parallel_end]
            self._end(line)
        elif line.room <= len(self._newline):
            line.context += [*self._newline, self._parallel_end]
            self._end_by_length(line)
        else:
            line.context += self._newline
            self._request(line, "join", first.request_id)

    def _end_by_length(self, line: _Line) -> None:
        if line.block is not None:
            self.limits.threads += 1
        else:
            self.limits.response = 1
        self._end(line)

    def _end(self, line: _Line) -> None:
        """Ends a line by force; the lines that it is part of end at their joins."""
        if line.block is None:
            if line.room < 0:
                self.limits.response = 1
            return
        line.context = [*line.context, *self._newline, self._thread_end]
        line.closed = True
        block: _Block | None = line.block
        while block is not None:
            block.is_last = True
            block = block.line.block
        self._join(line.block)


@dataclass
class _Line:
    """The main line or a thread: a run of requests, one after another.

    Attributes:
        id: what the ids of its requests begin with.
        context: ids from the prompt on; never modified in place, since requests refer to it.
        start: where its own tokens begin, after the prompt or the forced header.
        limit: how many tokens of its own it may have.
        levels: how many levels of blocks may still open in it.
        block: whose thread it is; None for the main line.
        closed: its </Thread> is there.
        request_id: its latest request.
    """

    id: RequestId
    context: list[int]
    start: int
    limit: int
    levels: int
    block: _Block | None
    closed: bool = False
    request_id: RequestId = ()
    num_requests: int = 0
    num_blocks: int = 0

    @property
    def room(self) -> int:
        return self.start + self.limit - len(self.context)


@dataclass(eq=False)
class _Block:
    """The threads that a line forked into; is_last if the line ends when they are joined."""

    line: _Line
    threads: list[_Line] = field(default_factory=list)
    is_last: bool = False
