"""Responses to the problems of a task: queued on an engine, decoded, and graded meanwhile."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from threadweaver import ranks
from threadweaver.data.overlap import Text, text_of
from threadweaver.evaluate.dealing import Dealing
from threadweaver.evaluate.grade import Graded, grade, submit
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
    known: Collection[int] = (),
    on_progress: Callable[[int], None] = lambda done: None,
    on_response: Callable[[int, Rollout], object] = lambda number, rollout: None,
) -> int:
    """Decodes `samples` responses to each problem, whatever the ranks in the same way. All ranks
    call it together, and each decodes all responses to the problems that it is dealt or takes.

    Args:
        at_once: problems that a rank decodes at the same time; None: as many as the engine takes.
        known: numbers in `queue` of responses that are there already; of the first rank.
        on_progress: gets the number of responses that are there, after every step.
        on_response: gets each response that is decoded, and its number, when it is done; nothing
            else keeps it.

    Returns:
        How many this rank decoded, and knew.

    Raises:
        ValueError: as `queue`.
        NonFiniteLogits: from the engine.
    """
    done = len(known)
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
        nonlocal done
        if engine.unfinished < len(decoding):
            for number in [n for n, one in decoding.items() if one.weaver.done]:
                on_response(number, decoding.pop(number).rollout())
                done += 1

    def on_step(_: list[Any]) -> None:
        settle()
        while at_once is None and engine.has_room and (number := dealing.take()) is not None:
            add([number])
        on_progress(done)

    part = dealing.start
    while part:
        add(part)
        engine.run(on_step, keep=False)
        settle()
        part = dealing.take_up_to(most)
    return done


class Grading:
    """The grading of responses, which a task that can does while the engine decodes on.

    Args:
        problems: of the responses; `samples` of the first, then of the second, and so on.
        settings: that they are decoded with.
        with_rollouts: whether rollouts are kept; else nothing of a response but its text.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        samples: int,
        task: Task,
        codec: Codec,
        settings: GenerationSettings,
        with_rollouts: bool = False,
    ):
        self._problems = [problem for problem in problems for _ in range(samples)]
        self._task, self._codec, self._settings = task, codec, settings
        self._with_rollouts = with_rollouts
        self._graded: dict[int, Graded] = {}  # wrong until the verdict is there
        self._verdicts: dict[int, Callable[[], bool]] = {}

    def submit(self, number: int, rollout: Rollout) -> str:
        """Takes a response, for `decode`; returns its text."""
        problem = self._problems[number]
        submitted = submit(problem, rollout.response, self._task, self._codec)
        self._verdicts[number] = submitted.is_correct
        wrong = submitted._replace(is_correct=lambda: False)
        graded = grade(problem, rollout, wrong, self._codec, self._settings)
        self._graded[number] = graded if self._with_rollouts else replace(graded, rollout=None)
        return submitted.text

    def finish(self, on_graded: Callable[[int], None]) -> dict[int, Graded]:
        """The responses and their grades, by number, in order; `on_graded` gets the number of
        graded ones after each."""
        finished: dict[int, Graded] = {}
        for number in sorted(self._graded):
            graded, correct = self._graded.pop(number), self._verdicts.pop(number)()
            no_answer = graded.no_answer and not correct
            finished[number] = replace(graded, correct=correct, no_answer=no_answer)
            on_graded(len(finished))
        return finished


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
    with_rollouts: bool = False,
) -> list[Graded]:
    """Decodes and grades `samples` responses to each problem, in the order of `queue`. All ranks
    call it together, and get all of it, by `of_all_ranks`.

    Args:
        with_rollouts: for training on them: those that this rank decodes have their rollouts, and
            those of others no text.
    """
    grading = Grading(problems, samples, task, engine.codec, settings, with_rollouts)
    done = decode(
        engine,
        problems,
        settings,
        samples=samples,
        seed=seed,
        on_progress=on_progress,
        on_response=grading.submit,
    )
    graded = grading.finish(on_graded)
    return of_all_ranks(
        graded, problems, samples, lambda: on_progress(done), with_texts=not with_rollouts
    )


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
