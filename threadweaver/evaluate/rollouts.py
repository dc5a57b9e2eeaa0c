"""Responses to the problems of a task: queued on an engine, decoded, and graded meanwhile."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Any, NamedTuple

from threadweaver import ranks
from threadweaver.data.overlap import Text, text_of
from threadweaver.evaluate.dealing import Dealing
from threadweaver.evaluate.grade import Graded, Submitted, grade, submit
from threadweaver.generate.decoder import Decoder, Decoding
from threadweaver.generate.fitting import fitting_prompts
from threadweaver.generate.rollout import Rollout
from threadweaver.generate.sampler import stream_key
from threadweaver.generate.settings import GenerationSettings
from threadweaver.shared import wait_for_all
from threadweaver.tasks import Problem, Task
from threadweaver.trajectory import Codec

_ANY = Problem("", "", "")


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
    prompts = [(problem.source, problem.prompt) for problem in problems]
    ids, skipped, notes = fitting_prompts(engine, prompts, settings, most_tokens)
    return Fitting([problems[number] for number in ids], skipped, notes)


def queue(
    engine: Decoder,
    problems: Sequence[Problem],
    settings: GenerationSettings,
    *,
    samples: int = 1,
    seed: Sequence[int] = (0,),
    numbers: Iterable[int] | None = None,
    known: Container[int] = (),
) -> dict[int, Decoding]:
    """Adds `samples` responses to each problem to an engine, in the order of the problems. Returns
    them by their numbers: `samples` to the first problem, then to the second, and so on.

    Args:
        seed: of the draws, with the numbers of problem and sample. The same seed, model, problems
            and settings give the same responses.
        numbers: of the problems whose responses are added; default: all.
        known: numbers of responses that are there already, and are not added.

    Raises:
        ValueError: a prompt or setting that the engine refuses; names the problem.
    """
    decodings: dict[int, Decoding] = {}
    for i in range(len(problems)) if numbers is None else numbers:
        try:
            prompt = engine.codec.encode_prompt(problems[i].prompt)
            for j in range(samples):
                if (number := i * samples + j) not in known:
                    key = stream_key((*seed, i, j))
                    decodings[number] = engine.add(prompt, settings, key)
        except ValueError as error:
            raise ValueError(f"{problems[i].source}: {error}") from error
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
) -> dict[int, Rollout]:
    """Decodes `samples` responses to each problem, whatever the ranks in the same way. All ranks
    call it together, and each decodes all responses to the problems that it is dealt or takes.

    Args:
        at_once: problems that a rank decodes at the same time; None: as many as the engine takes.
        known: responses that are there already, by their numbers in `queue`; of the first rank.
        on_progress: gets the number of responses that are there, after every step.
        on_response: gets each response that is decoded, and its number, when it is done.

    Returns:
        What this rank decoded, and what it knew, by number.

    Raises:
        ValueError: as `queue`.
        NonFiniteLogits: from the engine.
    """
    rollouts = dict(known)
    there = ranks.from_first(set(known))
    # Of problems with a response that is not there.
    numbers = sorted({n // samples for n in range(len(problems) * samples) if n not in there})
    most = at_once
    if most is None:
        most = max(len(numbers), 1) if ranks.size() == 1 else -(-engine.max_sequences // samples)
    dealing = Dealing(numbers, most)
    decoding: dict[int, Decoding] = {}

    def add(numbers: Iterable[int]) -> None:
        added = queue(
            engine, problems, settings, samples=samples, seed=seed, numbers=numbers, known=there
        )
        decoding.update(added)

    def settle() -> None:
        if engine.unfinished < len(decoding):
            for number in [n for n, one in decoding.items() if one.weaver.done]:
                rollouts[number] = decoding.pop(number).rollout()
                on_response(number, rollouts[number])

    def on_step(_: list[Any]) -> None:
        settle()
        while at_once is None and engine.has_room and (number := dealing.take()) is not None:
            add([number])
        on_progress(len(rollouts))

    part = dealing.start
    while part:
        add(part)
        engine.run(on_step)
        settle()
        part = dealing.take_up_to(most)
    return rollouts


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
        rollouts: Mapping[int, Rollout],
        settings: GenerationSettings,
        on_graded: Callable[[int], None],
    ) -> dict[int, Graded]:
        """The grades of these responses, by number, in order; `on_graded` gets the number of graded
        ones after each."""
        graded: dict[int, Graded] = {}
        for number, rollout in sorted(rollouts.items(), key=itemgetter(0)):
            problem, submitted = self._problems[number], self._submitted.pop(number)
            graded[number] = grade(problem, rollout, submitted, self._codec, settings)
            on_graded(len(graded))
        return graded


def of_all_ranks(
    own: Mapping[int, Graded],
    problems: Sequence[Problem],
    samples: int,
    on_wait: Callable[[], object],
    with_texts: bool = True,
) -> list[Graded]:
    """The graded responses of all ranks, in order; those of others have no rollout, and a text only
    if wanted. All ranks call it; `on_wait` is called now and then until the last of them does."""
    if ranks.size() == 1:
        return list(own.values())
    wait_for_all(on_wait)
    # All ranks have the problems; what a task keeps in one need not be fit for sending.
    light = {
        n: replace(g, rollout=None, problem=_ANY, response=g.response if with_texts else "")
        for n, g in own.items()
    }
    sent = {n: graded for part in ranks.gather(light) for n, graded in part.items()}
    return [
        own.get(number) or replace(sent[number], problem=problems[number // samples])
        for number in range(len(problems) * samples)
    ]


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
    with_texts: bool = True,
) -> list[Graded]:
    """Decodes and grades `samples` responses to each problem, in the order of `queue`. All ranks
    call it together, and get all of it, by `of_all_ranks`."""
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
    graded = grading.finish(rollouts, settings, on_graded)
    return of_all_ranks(graded, problems, samples, lambda: on_progress(len(rollouts)), with_texts)


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
