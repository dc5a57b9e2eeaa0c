"""Responses to the problems of a task: queued on an engine, decoded, and graded meanwhile."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from threadweaver.data.overlap import Text, text_of
from threadweaver.evaluate.grade import Graded, Submitted, grade, submit
from threadweaver.generate.decoder import Decoder, Decoding
from threadweaver.generate.rollout import Rollout
from threadweaver.generate.sampler import stream_key
from threadweaver.generate.settings import GenerationSettings, PromptTooLong
from threadweaver.tasks import Problem, Task
from threadweaver.trajectory import Codec


class Fitting(NamedTuple):
    """The problems whose prompts leave room for a response, in order; how many do not; and lines to
    show: of what is skipped, and of responses that the model's context ends early."""

    problems: list[Problem]
    skipped: int
    notes: list[str]


def fitting(
    engine: Decoder,
    problems: Sequence[Problem],
    settings: GenerationSettings,
    most_tokens: int | None = None,
) -> Fitting:
    """Sorts out, before anything is decoded, the prompts that leave no room for a response.

    Args:
        most_tokens: of a prompt and the first token after it, if that is less than the context.

    Raises:
        PromptTooLong: all are.
        ValueError: as `queue`, for any other reason.
    """
    fit: list[Problem] = []
    first: str | None = None
    least = settings.max_tokens
    for problem in problems:
        prompt = engine.codec.encode_prompt(problem.prompt)
        try:
            room = engine.check(prompt, settings)
            if most_tokens is not None and len(prompt) >= most_tokens:
                raise PromptTooLong(
                    f"the prompt has {len(prompt)} tokens, and a path at most {most_tokens} "
                    "(optimization.batch_tokens)"
                )
        except PromptTooLong as error:
            first = first or f"{problem.source}: {error}"
            continue
        except ValueError as error:
            raise ValueError(f"{problem.source}: {error}") from error
        least = min(least, room)
        fit.append(problem)
    skipped = len(problems) - len(fit)
    if not fit:
        raise PromptTooLong(
            f"none of {len(problems):,} prompts leaves room for a response: {first}"
        )
    notes = [f"{skipped:,} of {len(problems):,} prompts are skipped: {first}"] if skipped else []
    if note := engine.context_note(settings, least):
        notes.append(note)
    return Fitting(fit, skipped, notes)


def queue(
    engine: Decoder,
    problems: Sequence[Problem],
    settings: GenerationSettings,
    *,
    samples: int = 1,
    seed: Sequence[int] = (0,),
    first: int = 0,
    known: Mapping[int, Rollout] = {},
) -> dict[int, Decoding]:
    """Adds `samples` responses to each problem to an engine, in the order of the problems. Returns
    them by their numbers in that order.

    Args:
        seed: of the draws, with the numbers of problem and sample. The same seed, model, problems
            and settings give the same responses.
        first: number of the first problem, if these are a part of a longer list; its first response
            has the number first * samples.
        known: responses that are there already, by number, and are not added.

    Raises:
        ValueError: a prompt or setting that the engine refuses; names the problem.
    """
    decodings: dict[int, Decoding] = {}
    for i, problem in enumerate(problems, first):
        try:
            prompt = engine.codec.encode_prompt(problem.prompt)
            for j in range(samples):
                if (number := i * samples + j) not in known:
                    key = stream_key((*seed, i, j))
                    decodings[number] = engine.add(prompt, settings, key)
        except ValueError as error:
            raise ValueError(f"{problem.source}: {error}") from error
    return decodings


def decode(
    engine: Decoder,
    problems: Sequence[Problem],
    settings: GenerationSettings,
    *,
    samples: int = 1,
    seed: Sequence[int] = (0,),
    at_once: int | None = None,
    known: Mapping[int, Rollout] = {},
    on_progress: Callable[[int], None] = lambda done: None,
    on_response: Callable[[int, Rollout], object] = lambda number, rollout: None,
) -> list[Rollout]:
    """Decodes `samples` responses to each problem, in the order of `queue`.

    Args:
        at_once: problems decoded at the same time; None: as many as the engine takes.
        known: responses that are there already, by number in that order.
        on_progress: gets the number of responses that are there, after every step.
        on_response: gets each response that is decoded, and its number, when it is done.

    Raises:
        ValueError: as `queue`.
        NonFiniteLogits: from the engine.
    """
    rollouts = dict(known)
    size = at_once or max(len(problems), 1)
    for first in range(0, len(problems), size):
        part = problems[first : first + size]
        added = queue(engine, part, settings, samples=samples, seed=seed, first=first, known=known)
        decoding, queued = dict(added), len(rollouts) + len(added)

        def on_step(_: list[Any], decoding=decoding, queued=queued) -> None:
            if engine.unfinished < len(decoding):
                done = [n for n, one in decoding.items() if one.weaver.done]
                for number in done:
                    on_response(number, decoding.pop(number).rollout())
            on_progress(queued - engine.unfinished)

        rollouts.update(zip(added, engine.run(on_step), strict=True))
    return [rollouts[number] for number in range(len(problems) * samples)]


class Grading:
    """The grading of responses, which a task that can does while the engine decodes on.

    Args:
        problems: of the responses; `samples` of the first, then of the second, and so on.
    """

    def __init__(self, problems: Sequence[Problem], samples: int, task: Task, codec: Codec):
        self._problems = [problem for problem in problems for _ in range(samples)]
        self._task, self._codec = task, codec
        self._submitted: dict[int, Submitted] = {}

    def submit(self, number: int, rollout: Rollout) -> str:
        """Takes a response, for `decode`; returns its text."""
        problem = self._problems[number]
        submitted = submit(problem, rollout.response, self._task, self._codec)
        self._submitted[number] = submitted
        return submitted.text

    def finish(
        self,
        rollouts: Sequence[Rollout],
        settings: GenerationSettings,
        on_graded: Callable[[int], None],
    ) -> list[Graded]:
        """The grades of the rollouts of all responses, in order; `on_graded` gets the number of
        graded ones after each."""
        graded: list[Graded] = []
        for number, (problem, rollout) in enumerate(zip(self._problems, rollouts, strict=True)):
            submitted = self._submitted.pop(number)
            graded.append(grade(problem, rollout, submitted, self._codec, settings))
            on_graded(len(graded))
        return graded


def roll_out(
    engine: Decoder,
    task: Task,
    problems: Sequence[Problem],
    settings: GenerationSettings,
    *,
    samples: int = 1,
    seed: Sequence[int] = (0,),
    on_progress: Callable[[int], None] = lambda done: None,
    on_graded: Callable[[int], None] = lambda count: None,
) -> list[Graded]:
    """Decodes and grades `samples` responses to each problem, in the order of `queue`."""
    grading = Grading(problems, samples, task, engine.codec)
    rollouts = decode(
        engine,
        problems,
        settings,
        samples=samples,
        seed=seed,
        on_progress=on_progress,
        on_response=grading.submit,
    )
    return grading.finish(rollouts, settings, on_graded)


def texts_of_problems(problems: Sequence[Problem]) -> Iterator[Text]:
    """What problems ask, to compare it with other data."""
    for problem in problems:
        yield Text(problem.source, text_of(problem.prompt))


def fingerprint(problems: Sequence[Problem]) -> str:
    """SHA-256 of the prompts and answers, in order; hexadecimal."""
    digest = hashlib.sha256()
    for problem in problems:
        digest.update(json.dumps([problem.prompt, problem.answer]).encode())
    return digest.hexdigest()
