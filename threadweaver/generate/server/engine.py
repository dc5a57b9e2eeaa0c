"""Many responses at once on a completions server: `Weaver` here, its requests there.

engine = connect(ServerSettings("http://localhost:8000"), codec, vocabulary, context_length)
engine.add(prompt_ids, GenerationSettings(max_tokens=1000))
rollouts = engine.run()

It is used as `Engine` is. Log-probabilities are not asked for: completions have none.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from threadweaver.generate.decoder import Decoding
from threadweaver.generate.rollout import Completion, Rollout
from threadweaver.generate.sampler import stream_key
from threadweaver.generate.server.address import ServerSettings, connection, find_model
from threadweaver.generate.server.completions import Completions, Reply, find_dialect
from threadweaver.generate.settings import GenerationSettings
from threadweaver.generate.weaver import Request, RequestId
from threadweaver.trajectory import Codec
from threadweaver.trajectory.ids import token_ids


@dataclass(eq=False)
class ServerGeneration(Decoding):
    """One response of a server.

    Attributes:
        asked: ids of the requests that were sent or wait to be.
    """

    asked: set[RequestId] = field(default_factory=set, repr=False)


class ServerEngine:
    """Decodes many generations at once on a server.

    Args:
        settings: of the server.
        completions: how its requests are put.
        context_length: most tokens of a prompt and its response.
        at_once: most requests that the server has at a time.

    Attributes:
        decoded_tokens: by all replies so far.
    """

    def __init__(
        self,
        settings: ServerSettings,
        completions: Completions,
        context_length: int,
        at_once: int,
    ):
        self.codec = completions.codec
        self.context_length = context_length
        self.decoded_tokens = 0
        self._settings, self._completions, self.max_sequences = settings, completions, at_once
        self._added: list[ServerGeneration] = []
        self._unfinished = 0
        self._waiting: deque[tuple[ServerGeneration, Request]] = deque()

    @property
    def unfinished(self) -> int:
        """Generations that are not done."""
        return self._unfinished

    @property
    def has_room(self) -> bool:
        """Whether the server could have more requests than were added."""
        return not self._waiting and self.unfinished < self.max_sequences

    def add(
        self, prompt: Iterable[int], settings: GenerationSettings, seed: int = 0
    ) -> ServerGeneration:
        """Queues a response; see `Engine.add`."""
        ids = token_ids(prompt, "prompt", self._completions.vocabulary)
        weaver = settings.weaver(ids, self.codec, self.context_length)
        generation = ServerGeneration(ids, settings, seed, weaver)
        self._added.append(generation)
        self._unfinished += 1
        self._open_requests(generation)
        return generation

    def check(self, prompt: Iterable[int], settings: GenerationSettings) -> int:
        """Most tokens that the response may have; see `Engine.check`."""
        ids = token_ids(prompt, "prompt", self._completions.vocabulary)
        settings.weaver(ids, self.codec, self.context_length)
        return min(settings.max_tokens, self.context_length - len(ids))

    def run(
        self, on_step: Callable[[list[Any]], None] | None = None, *, keep: bool = True
    ) -> list[Rollout]:
        """Decodes all generations that were added to their ends; see `Engine.run`.

        Args:
            on_step: gets the tokens of each reply.

        Raises:
            ServerError: the server fails, for good.
        """

        def report(tokens: list[int]) -> None:
            if not keep:
                self._added.clear()
            if on_step is not None:
                on_step(tokens)

        if self._waiting:
            asyncio.run(self._run(report))
        if not keep:
            self._added.clear()
        rollouts = [generation.rollout() for generation in self._added]
        self._added.clear()
        return rollouts

    async def _run(self, on_step: Callable[[list[Any]], None]) -> None:
        sent: set[asyncio.Task[tuple[ServerGeneration, Request, Reply]]] = set()
        async with connection(self._settings) as server:

            async def ask(generation: ServerGeneration, request: Request):
                generation.started = generation.started or time.perf_counter()
                reply = await self._completions.complete(
                    server,
                    request,
                    generation.settings.sampling,
                    stream_key((generation.seed, *request.id)),
                )
                return generation, request, reply

            done: set[asyncio.Task[tuple[ServerGeneration, Request, Reply]]] = set()
            try:
                while self._waiting or sent:
                    while self._waiting and len(sent) < self.max_sequences:
                        sent.add(asyncio.create_task(ask(*self._waiting.popleft())))
                    done, sent = await asyncio.wait(sent, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        on_step(self._take(*task.result()))
            finally:
                for task in sent:
                    task.cancel()
                await asyncio.gather(*sent, *done, return_exceptions=True)

    def _take(self, generation: ServerGeneration, request: Request, reply: Reply) -> list[int]:
        """Completes a request, and queues those that follow from it."""
        generation.completions[request.id] = Completion(
            request.id, request.context, reply.tokens, [], [], reply.reason
        )
        generation.ended = time.perf_counter()
        generation.weaver.complete(request, reply.tokens, reply.reason)
        self._unfinished -= generation.weaver.done
        self.decoded_tokens += len(reply.tokens)
        self._open_requests(generation)
        return reply.tokens

    def _open_requests(self, generation: ServerGeneration) -> None:
        """Queues the new requests of a generation, before those of others that have not begun."""
        new = [r for r in generation.weaver.requests() if r.id not in generation.asked]
        generation.asked.update(request.id for request in new)
        entries = [(generation, request) for request in new]
        if generation.started:
            self._waiting.extendleft(reversed(entries))
        else:
            self._waiting.extend(entries)


def connect(
    settings: ServerSettings,
    codec: Codec,
    vocabulary: int,
    context_length: int,
    *,
    parallel: bool,
    at_once: int,
) -> tuple[ServerEngine, str]:
    """An engine on a server, and a line about it to show.

    Args:
        codec: of the tokenizer of the server's model.
        vocabulary: all of its ids are below it.
        context_length: of the model; that of the server may be less.
        parallel: whether it is to decode threads.
        at_once: most requests that the server has at a time.

    Raises:
        ValueError: the package `openai` is not installed.
        ServerError: the server cannot be reached or used, or has no such model.
    """

    async def look() -> tuple[Completions, int]:
        async with connection(settings) as server:
            offer = await find_model(server, settings.model)
            length = min(context_length, offer.context_length or context_length)
            found = await find_dialect(server, offer.model, codec, vocabulary, parallel)
            return found, length

    completions, length = asyncio.run(look())
    how = {
        "token_ids": "prompts and replies as token ids",
        "generate": "prompts and replies as token ids (/generate)",
        "logprobs": "prompts and replies as token ids (log-probabilities)",
        "text": "prompts and replies as text, encoded here: tokens need not be those it sampled",
    }
    note = f"server: {settings.root}, model {completions.model}, {how[completions.dialect]}"
    return ServerEngine(settings, completions, length, at_once), note
