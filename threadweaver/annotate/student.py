"""Step 0: problems without a response are answered by the student, one response each.

    0-answer/000012.json    {"source", "response", "note", "max_tokens"}

`note` says why there is no response, or what cut it off (MAX_TOKENS, CONTEXT); it is empty for one
that ended by itself. `max_tokens` is the setting with which it was cut off, null if it was not.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from threadweaver.annotate.store import Store, damaged, read_json, write_json
from threadweaver.generate.engine import Engine, Generation, Token
from threadweaver.generate.sampler import stream_key
from threadweaver.generate.settings import GenerationSettings, PromptTooLong
from threadweaver.progress import ResponsesProgress, print_line
from threadweaver.tasks import Problem

STEP = "0-answer"
MAX_TOKENS = "the answer was cut off (generation.max_tokens)"
CONTEXT = "the answer was cut off (the model's context)"


def unanswered(store: Store, problems: Sequence[Problem]) -> list[int]:
    """Numbers, counted from 1, of problems that have no response, nor one in the folder."""
    return [n for n, p in enumerate(problems, 1) if not p.data and not store.path(STEP, n).exists()]


class Answer(NamedTuple):
    """The response to a problem, its own or the student's, and what its file says of it."""

    response: str
    note: str = ""
    max_tokens: int | None = None


def answered(store: Store, number: int, problem: Problem) -> Answer:
    """The answer that is there. Raises ValueError for a damaged file."""
    if problem.data:
        return Answer(problem.data)
    path: Path = store.path(STEP, number)
    record = read_json(path, "response")
    # Folders of earlier versions do not say what cut an answer off.
    answer = Answer(record["response"], record.get("note", ""), record.get("max_tokens"))
    for value, kind in zip(answer, (str, str, int | None), strict=True):
        if not isinstance(value, kind):
            raise damaged(path, f"{str(value)[:40]!r} is none of its values")
    return answer


def cut_off(store: Store, problems: Sequence[Problem], max_tokens: int) -> dict[int, Answer]:
    """Answers that a smaller generation.max_tokens cut off, by number."""
    found = {}
    for number, problem in enumerate(problems, 1):
        if not problem.data and store.path(STEP, number).exists():
            answer = answered(store, number, problem)
            if answer.note == MAX_TOKENS and (answer.max_tokens or 0) < max_tokens:
                found[number] = answer
    return found


def answer(
    store: Store,
    problems: Sequence[Problem],
    numbers: Sequence[int],
    engine: Engine,
    settings: GenerationSettings,
    seed: int,
    console: Console,
) -> None:
    """Answers the problems of these numbers; each response is in its file as soon as it is there.

    Args:
        console: for notes and progress.

    Raises:
        ValueError: a setting or prompt that the engine refuses; names the problem.
        NonFiniteLogits: from the engine.
    """
    waiting: dict[int, Generation] = {}
    least = settings.max_tokens
    for number in numbers:
        problem = problems[number - 1]
        try:
            prompt = engine.codec.encode_prompt(problem.prompt)
            least = min(least, engine.check(prompt, settings))
            waiting[number] = engine.add(prompt, settings, stream_key((seed, number)))
        except PromptTooLong as error:
            _save(store, number, problem, Answer("", str(error)))
        except ValueError as error:
            raise ValueError(f"{problem.source}: {error}") from error
    if note := settings.context_note(least, engine.context_length):
        print_line(console, note)
    total = len(waiting)

    def save(_: list[Token]) -> None:
        if engine.unfinished < len(waiting):
            for number in [n for n, generation in waiting.items() if generation.weaver.done]:
                weaver = waiting.pop(number).weaver
                response = weaver.response
                text = engine.codec.decode([i for i in response if i not in engine.codec.end_ids])
                found = Answer(text)
                if weaver.limits.response:
                    note = CONTEXT if len(response) < settings.max_tokens else MAX_TOKENS
                    found = Answer(text, note, settings.max_tokens)
                _save(store, number, problems[number - 1], found)
        progress.decoded(total - engine.unfinished)

    with ResponsesProgress(console, "answering", total, engine) as progress:
        engine.run(save, keep=False)


def _save(store: Store, number: int, problem: Problem, answer: Answer) -> None:
    write_json(store.path(STEP, number), {"source": problem.source, **answer._asdict()})
