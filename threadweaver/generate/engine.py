"""The in-process engine: continuous batching of fork-join rollouts on shared KV pages.

    engine = Engine(model, codec)
    for i in range(8):
        engine.add(prompt_ids, GenerationSettings(max_tokens=1000), seed=i)
    rollouts = engine.run()

It decodes on the weights of the model it is given, which a trainer may change between runs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, cast

from torch import Tensor
from transformers import PreTrainedModel

from threadweaver.generate.constraint import Constraint
from threadweaver.generate.decoder import Decoding
from threadweaver.generate.pages import PagePool
from threadweaver.generate.pool_size import pool_size
from threadweaver.generate.rollout import Completion, Rollout
from threadweaver.generate.runner import Counts, Runner, Step
from threadweaver.generate.sampler import stream_key
from threadweaver.generate.scheduler import Batch, Branch, Family, Scheduler, Sequence
from threadweaver.generate.settings import EngineSizes, GenerationSettings
from threadweaver.generate.weaver import Reason, RequestId, Weaver
from threadweaver.model import context_length, weights_fingerprint
from threadweaver.trajectory import Codec
from threadweaver.trajectory.ids import MOST_IDS, token_ids
from tw_kernels.sampling import SamplingRows

# Recorded completions by request id, which a generation takes instead of sampling.
Script = Mapping[RequestId, list[int]]


class NonFiniteLogits(ArithmeticError):  # noqa: N818 (named for what was found)
    """The model gave NaN or infinite logits; names the request."""


class Token(NamedTuple):
    """A decoded token, with the number of its generation and the id of its request."""

    generation: int
    request: RequestId
    id: int


@dataclass(eq=False)
class Generation(Decoding):
    """One response of an engine.

    Attributes:
        number: unique in its engine, in the order of `add`.
        open: the sequences of its open requests.
        retained: closed ones whose path a join may still extend.
    """

    number: int
    family: Family = field(repr=False)
    script: Script | None = field(default=None, repr=False)
    constraint: Constraint | None = field(default=None, repr=False)
    open: dict[RequestId, Sequence] = field(default_factory=dict, repr=False)
    retained: dict[RequestId, Sequence] = field(default_factory=dict, repr=False)


class Engine:
    """Decodes many generations at once.

    Args:
        model: loaded by threadweaver.model; stays where it is, on its device and in its dtype.
        page_size: tokens a KV page.
        num_pages: pages of the pool. Default: as many as kv_gigabytes hold.
        kv_gigabytes: memory for keys and values, in 1e9 bytes, or auto, as in EngineSizes.
        max_sequences: most threads, of all generations together, that a step advances.
        max_batch_tokens: most new tokens of a step; longer prefills go in chunks.
        autocast: see Runner.
        reserve: bytes of a GPU that auto leaves to others, which will have taken them when a batch
            begins.

    Attributes:
        pool: the KV pages.
        context_length: most tokens of a prompt and its response.
        decoded_tokens: by all steps so far.

    Raises:
        ValueError: sizes out of range.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        codec: Codec,
        *,
        page_size: int = 16,
        num_pages: int | None = None,
        kv_gigabytes: float | Literal["auto"] = "auto",
        max_sequences: int = 64,
        max_batch_tokens: int = 2048,
        autocast: bool = False,
        reserve: int = 0,
    ):
        self._sizes = EngineSizes(kv_gigabytes, page_size, max_sequences, max_batch_tokens)
        self._autocast = autocast
        self.codec = codec
        self.max_sequences = max_sequences
        self._model = model
        self._runner = Runner(
            model, num_pages or 0, page_size, autocast=autocast, max_sequences=max_sequences
        )
        self._pool_size = None
        if num_pages is None:
            reserve += self._runner.bytes_to_copy
            self._pool_size = pool_size(model, self._sizes, self._autocast, reserve)
            self._runner.num_pages = num_pages = self._pool_size.pages
        self.pool = PagePool(num_pages, page_size)
        self._scheduler = Scheduler(self.pool, max_sequences, max_batch_tokens)
        self._families: dict[tuple[int, ...], Family] = {}
        self._live: dict[int, Generation] = {}
        self._added: dict[int, Generation] = {}  # since the last run, by number
        self._done: list[int] = []  # of those
        self._keeps = False  # whether `run` is to return what is done
        self._count = 0
        self.decoded_tokens = 0
        self._is_cast = False  # whether the runner took the weights since it last had no work
        self.context_length = context_length(model) or MOST_IDS
        self._rows = cast(Tensor, model.get_input_embeddings().weight).shape[0]
        self._orchestration = 0.0  # seconds
        self._ahead: Step | None = None  # the next one, if it is launched already
        self._is_broken = False  # whether a step began and did not end

    @property
    def seconds(self) -> dict[str, float]:
        """Where the time of `step` went: "model" (with "attention" in it), "plan", "sampling", and
        "orchestration", which is all the rest."""
        return {**self._runner.seconds, "orchestration": self._orchestration}

    @property
    def counts(self) -> Counts:
        """What steps cost beside their kernels."""
        return self._runner.counts

    @property
    def preemptions(self) -> int:
        """How often a running sequence had to give up its pages."""
        return self._scheduler.preemptions

    @property
    def unfinished(self) -> int:
        """Generations that are not done."""
        return len(self._live)

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    @property
    def has_room(self) -> bool:
        """Whether the next step could advance more than was added."""
        return self._scheduler.has_room

    def fingerprint(self) -> str:
        """A short name of the weights as they are now."""
        return weights_fingerprint(self._model)

    def add(
        self,
        prompt: Iterable[int],
        settings: GenerationSettings,
        seed: int = 0,
        script: Script | None = None,
        constraint: Constraint | None = None,
    ) -> Generation:
        """Queues a response.

        Args:
            prompt: ids, [T], T >= 1.
            seed: of its draws; the same seed, prompt and model give the same response.
            script: completions to take instead of sampling. A request that is not in it, or at the
                end of its completion there, ends by length.
            constraint: rules out tokens; log-probabilities are then those among the others. In
                sequential mode alone, where a response is one request.

        Raises:
            ValueError: the prompt is empty or fills the model's context, an id is none of the
                model's, a setting is out of range, or the pool cannot hold the response's longest
                path.
        """
        if constraint is not None and settings.mode != "sequential":
            raise ValueError(f"mode is {settings.mode}: a constraint needs sequential mode")
        ids = token_ids(prompt, "prompt", self._rows)
        weaver, _ = self._checked(ids, settings)
        if script is not None:
            script = {
                request: token_ids(tokens, f"script, request {request}", self._rows)
                for request, tokens in script.items()
            }
        family = self._families.setdefault(tuple(ids), Family(len(ids)))
        family.unfinished += 1
        generation = Generation(
            ids, settings, seed, weaver, self._count, family, script, constraint
        )
        self._count += 1
        self._live[generation.number] = self._added[generation.number] = generation
        self._open_requests(generation)
        return generation

    def check(self, prompt: Iterable[int], settings: GenerationSettings) -> int:
        """Most tokens that the response may have: max_tokens, or less where the context ends.

        Raises:
            ValueError: what `add` refuses.
        """
        return self._checked(token_ids(prompt, "prompt", self._rows), settings)[1]

    def _checked(self, ids: list[int], settings: GenerationSettings) -> tuple[Weaver, int]:
        """The state machine of a response, and most tokens that it may have."""
        weaver = settings.weaver(ids, self.codec, self.context_length)
        room = min(settings.max_tokens, self.context_length - len(ids))
        pages = -(-(len(ids) + room) // self.pool.page_size)
        if pages > self.pool.num_pages:
            # What auto leaves of a GPU is all that there is.
            is_rest = self._sizes.kv_gigabytes == "auto" and self._model.device.type == "cuda"
            more = (
                "lower max_sequences and max_batch_tokens" if is_rest else "give more kv_gigabytes"
            )
            raise ValueError(
                f"a prompt of {len(ids)} tokens and a response of up to {room} need "
                f"{pages} KV pages of {self.pool.page_size} tokens, and the pool has "
                f"{self.pool.num_pages}: lower max_tokens, or {more}"
            )
        return weaver, room

    def step(self) -> list[Token]:
        """One forward pass: prefills and decodes what fits. Returns the tokens it decoded.

        Unless `run` calls it, to return them, generations that it brings to their end are the
        caller's: the engine keeps nothing of them, and a later `run` does not return them.

        Weights must not change while generations are unfinished: copies are made by the first step
        of a run.

        Raises:
            NonFiniteLogits: the model gave NaN or infinite logits; names the request.
            RuntimeError: an earlier step raised an error or was interrupted. What it computed is
                lost, and so are all unfinished generations.
        """
        if self._is_broken:
            raise RuntimeError("a step of this engine failed or was interrupted: make a new engine")
        start, before = time.perf_counter(), self._in_runner()
        if not self._is_cast:
            self._runner.cast()
            self._fit_pool()
            self._is_cast = True
        self._is_broken = True
        batch, step = self._scheduler.schedule(), self._ahead
        if step is None:
            step = self._plan(batch)
            self._runner.launch(step)
        self._ahead = self._launch_next(step)
        draws = self._draws(step)
        for number in {s.rank[0] for s in batch.sequences if s.is_open}:
            generation = self._live[number]
            generation.steps += 1
            generation.started = generation.started or start
        tokens = [self._advance(*draw) for draw in draws]
        self.decoded_tokens += len(tokens)
        if (ahead := self._ahead) is not None and not any(s.is_open for s in ahead.sequences):
            self._runner.read(ahead)  # so that nothing runs on after the last step
            self._ahead = None
        if not self._keeps:
            for number in self._done:
                del self._added[number]
            self._done.clear()
        self._is_broken = False
        self._orchestration += time.perf_counter() - start - (self._in_runner() - before)
        return tokens

    def run(
        self, on_step: Callable[[list[Token]], None] | None = None, *, keep: bool = True
    ) -> list[Rollout]:
        """Decodes all generations that were added to their ends. Returns their rollouts in the
        order of `add`, each only once and without those that a `step` came to the end of.

        Args:
            on_step: gets the tokens of each step.
            keep: false for who takes each generation when it is done: none is returned, and the
                engine keeps nothing of it, as by `step`.
        """
        self._keeps = keep
        try:
            while self.has_work:
                tokens = self.step()
                if on_step is not None:
                    on_step(tokens)
        finally:
            self._keeps = False
        rollouts = [generation.rollout() for generation in self._added.values()] if keep else []
        self._added.clear()
        self._done.clear()
        return rollouts

    def free(self) -> None:
        """Gives the memory of the KV pages back until the next step, for a trainer's update.

        Raises:
            RuntimeError: some generation is not finished.
        """
        if self.has_work:
            raise RuntimeError(f"{len(self._live)} generations are not finished")
        self._runner.free()

    @property
    def pool_note(self) -> str | None:
        """A line to show of a pool whose size nobody named: how many tokens fit."""
        return str(self._pool_size) if self._sizes.kv_gigabytes == "auto" else None

    def _fit_pool(self) -> None:
        """Makes a pool of auto smaller if less memory is left than when its size was found. A batch
        begins and no branch has pages yet.

        Raises:
            MemoryError: too little is left for the longest response, or for a page.
        """
        if self._pool_size is None or self._runner.holds_pages:
            return
        try:
            pages = pool_size(self._model, self._sizes, self._autocast).pages
        except ValueError as error:
            raise MemoryError(str(error)) from error
        if pages >= self.pool.num_pages:
            return
        longest = max(
            len(g.prompt) + min(g.settings.max_tokens, self.context_length - len(g.prompt))
            for g in self._live.values()
        )
        if pages * self.pool.page_size < longest:
            raise MemoryError(
                f"{pages} KV pages of {self.pool.page_size} tokens are left for a prompt and its "
                f"response of {longest} tokens: lower max_tokens, or end what else uses the device"
            )
        self.pool = self._scheduler.pool = PagePool(pages, self.pool.page_size)
        self._runner.num_pages = pages

    def _in_runner(self) -> float:
        """Seconds, in which those of attention are once."""
        seconds = self._runner.seconds
        return sum(seconds.values()) - seconds["attention"]

    def _plan(self, batch: Batch) -> Step:
        """Whatever of a step does not depend on its token ids."""
        ready = [s for s in batch.sequences if s.pending <= 0]
        # One token is still to come where a step is planned ahead.
        positions = [len(s.logprobs) - s.pending for s in ready]
        rows = SamplingRows.build(
            [s.key for s in ready],
            positions,
            [self._live[s.rank[0]].settings.sampling.settings for s in ready],
            [s.script[p] if s.script else None for s, p in zip(ready, positions, strict=True)],
        )
        constraints = [self._live[s.rank[0]].constraint for s in ready]
        return self._runner.plan(batch, ready, rows, constraints)

    def _launch_next(self, step: Step) -> Step | None:
        """The next step, launched while the device computes this one, if it can be known.

        A stop token is not: it ends a sequence that the next step computes all the same. What that
        draws for it is never looked at, and its place in a page is taken back.
        """
        if not self._runner.overlaps or any(
            self._settles(s, len(s.logprobs) + 1) for s in step.sequences if s.is_open
        ):
            return None
        batch = self._scheduler.look_ahead()
        if batch is None:
            return None
        ahead = self._plan(batch)
        self._runner.launch(ahead, after=step)
        return ahead

    def _settles(self, sequence: Sequence, count: int) -> bool:
        """Whether more than an appended token comes of the count-th of a sequence, whatever it
        is: the state of a constraint too."""
        request, script = sequence.request, sequence.script
        if self._live[sequence.rank[0]].constraint is not None:
            return True
        if count == request.max_tokens or (script and count == len(script)):
            return True
        return request.kind == "prompt" and count == 1

    def _draws(self, step: Step) -> list[tuple[Sequence, int, float, float]]:
        """Sequences that have not ended, each with a token and its two log-probabilities, of a
        launched step."""
        draws = self._runner.read(step)
        columns = draws.tokens.tolist(), draws.logprobs.tolist(), draws.sampled_logprobs.tolist()
        rows = zip(step.sequences, *columns, strict=True)
        rows = [row for row in rows if row[0].is_open]
        for sequence, _, logprob, _ in rows:
            if math.isnan(logprob):
                raise NonFiniteLogits(
                    f"generation {sequence.rank[0]}, request {sequence.request.id}: the model's "
                    f"logits after {len(sequence.ids)} tokens are not finite"
                )
        return rows

    def _advance(
        self, sequence: Sequence, token: int, logprob: float, sampled_logprob: float
    ) -> Token:
        """Appends a token, and closes the request if it was its last."""
        sequence.ids.append(token)
        sequence.logprobs.append(logprob)
        sequence.sampled_logprobs.append(sampled_logprob)
        request, count = sequence.request, len(sequence.logprobs)
        if constraint := self._live[sequence.rank[0]].constraint:
            constraint.accept(token)
        if token in request.stop_ids:
            self._close(sequence, "eos" if token in self.codec.end_ids else "stop")
        elif count == request.max_tokens or (sequence.script and count == len(sequence.script)):
            self._close(sequence, "length")
        elif sequence.request.kind == "prompt" and count == 1:
            self._keep_prompt(sequence)
        return Token(sequence.rank[0], request.id, token)

    def _close(self, sequence: Sequence, reason: Reason) -> None:
        generation, request = self._live[sequence.rank[0]], sequence.request
        tokens = sequence.ids[len(request.context) :]
        generation.completions[request.id] = Completion(
            request.id,
            request.context,
            tokens,
            sequence.logprobs,
            sequence.sampled_logprobs,
            reason,
        )
        sequence.is_open = False
        del generation.open[request.id]
        generation.retained[request.id] = sequence
        self._scheduler.keep(sequence)
        generation.weaver.complete(request, tokens, reason)
        self._open_requests(generation)

    def _open_requests(self, generation: Generation) -> None:
        """Adds a sequence on its parent's pages for each new request, and releases the sequences
        that no later request extends."""
        weaver, script = generation.weaver, generation.script
        while new := [r for r in weaver.requests() if r.id not in generation.open]:
            for request in new:
                recorded = None if script is None else script.get(request.id, [])
                if recorded == []:
                    weaver.complete(request, [], "length")
                    continue
                sequence = Sequence(
                    (generation.number, *request.id),
                    list(request.context),
                    generation.family,
                    request=request,
                    key=stream_key((generation.seed, *request.id)),
                    script=recorded,
                )
                if parent := generation.retained.get(request.parent or ()):
                    if request.kind == "thread":
                        sequence.table = self.pool.fork(parent.table)
                    else:
                        self.pool.adopt(sequence.table, parent.table)
                generation.open[request.id] = sequence
                self._scheduler.add(sequence)
        for id in generation.retained.keys() - weaver.retained():
            self._scheduler.remove(generation.retained.pop(id))
        if weaver.done:
            self._finish(generation)

    def _keep_prompt(self, sequence: Sequence) -> None:
        """Keeps the prompt's pages for generations of the same prompt that have yet to start."""
        family = sequence.family
        length = family.prompt_length - 1
        if family.unfinished == 1 or length == 0 or (family.stem and family.stem.table.length):
            return
        if family.stem is None:
            family.stem = Branch(sequence.rank[:1], sequence.ids[:length], family)
            self._scheduler.keep(family.stem)
        family.stem.table = self.pool.fork(sequence.table, length)

    def _finish(self, generation: Generation) -> None:
        generation.ended = time.perf_counter()
        generation.started = generation.started or generation.ended
        del self._live[generation.number]
        self._done.append(generation.number)
        family = generation.family
        family.unfinished -= 1
        if family.unfinished == 0:
            if family.stem:
                self._scheduler.remove(family.stem)
                family.stem = None  # which refers to the family
            del self._families[tuple(generation.prompt)]
        if not self.has_work:
            self._is_cast = False
