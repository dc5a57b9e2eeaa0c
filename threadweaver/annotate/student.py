"""Step 0: problems without a response are answered by the student, one response each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from threadweaver.annotate.store import Store, read_json, write_json
from threadweaver.generate.engine import Engine, Generation, Token
from threadweaver.generate.sampler import stream_key
from threadweaver.generate.settings import GenerationSettings, PromptTooLong
from threadweaver.progress import ResponsesProgress
from threadweaver.tasks import Problem

STEP = "0-answer"


def unanswered(store: Store, problems: Sequence[Problem]) -> list[int]:
    """Numbers, counted from 1, of problems that have no response, nor one in the folder."""
    return [n for n, p in enumerate(problems, 1) if not p.data and not store.path(STEP, n).exists()]


def answered(store: Store, number: int, problem: Problem) -> str:
    """The response to a problem: its own or the student's. Empty if it left no room for one."""
    if problem.data:
        return problem.data
    path: Path = store.path(STEP, number)
    response = read_json(path, "response")["response"]
    if not isinstance(response, str):
        raise ValueError(f"{path} holds no text as its response: delete it and run again")
    return response


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

    Raises:
        ValueError: a setting or prompt that the engine refuses; names the problem.
        NonFiniteLogits: from the engine.
    """
    waiting: dict[int, Generation] = {}
    for number in numbers:
        problem = problems[number - 1]
        try:
            prompt = engine.codec.encode_prompt(problem.prompt)
            waiting[number] = engine.add(prompt, settings, stream_key((seed, number)))
        except PromptTooLong as error:
            _save(store, number, problem, "", str(error))
        except ValueError as error:
            raise ValueError(f"{problem.source}: {error}") from error
    total = len(waiting)

    def save(_: list[Token]) -> None:
        if engine.unfinished < len(waiting):
            for number in [n for n, generation in waiting.items() if generation.weaver.done]:
                response = waiting.pop(number).weaver.response
                text = engine.codec.decode([i for i in response if i not in engine.codec.end_ids])
                _save(store, number, problems[number - 1], text, "")
        progress.decoded(total - engine.unfinished)

    with ResponsesProgress(console, "answering", total, engine) as progress:
        engine.run(save)


def _save(store: Store, number: int, problem: Problem, response: str, note: str) -> None:
    write_json(
        store.path(STEP, number), {"source": problem.source, "response": response, "note": note}
    )
