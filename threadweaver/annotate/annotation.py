"""The whole of one command: answers, the teacher's part, what is kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any, Self

from rich.console import Console

from threadweaver.annotate.engine_teacher import EngineTeacher
from threadweaver.annotate.failures import LeftOut
from threadweaver.annotate.keep import grading, kept_row, trained_response
from threadweaver.annotate.lines import split
from threadweaver.annotate.openai_teacher import OpenAITeacher
from threadweaver.annotate.prompts import PLACES, Prompts
from threadweaver.annotate.report import plot_summary
from threadweaver.annotate.run import NO_REPLY, REFUSED, Given, Run, problem_text
from threadweaver.annotate.settings import AnnotateSettings
from threadweaver.annotate.store import Store, write_json
from threadweaver.annotate.student import (
    MAX_TOKENS,
    STEP,
    Answer,
    answer,
    answered,
    cut_off,
    unanswered,
)
from threadweaver.annotate.summary import summarize
from threadweaver.annotate.teacher import Teacher
from threadweaver.annotate.trajectory import map_prompt
from threadweaver.device import find_device
from threadweaver.generate.load import load_engine, settle_precision
from threadweaver.model import add_tags, load_tokenizer
from threadweaver.progress import Progress, print_line
from threadweaver.tasks import Problem, Task
from threadweaver.trajectory import Codec, opened_thinking
from threadweaver.whole_file import write_whole


class Annotation:
    """From problems to kept rows, in a folder that belongs to it while it is open.

    Attributes:
        folder: that it is in.
    """

    def __init__(
        self,
        options: AnnotateSettings,
        task: Task,
        problems: Sequence[Problem],
        prompts: Prompts,
        codec: Codec,
        server: OpenAITeacher | None,
        store: Store,
        console: Console,
        progress: Console,
    ):
        self.folder = store.folder
        self._options, self._task, self._problems = options, task, problems
        self._prompts, self._codec, self._store = prompts, codec, store
        self._server, self._console, self._progress = server, console, progress
        self._results: dict[int, str | LeftOut] = {}

    @classmethod
    def begin(
        cls,
        options: AnnotateSettings,
        task: Task,
        problems: Sequence[Problem],
        prompts: Prompts,
        console: Console,
        progress: Console,
    ) -> Self:
        """What the command asks for, before any work.

        Args:
            console: for notes.
            progress: for progress.

        Raises:
            ValueError: models, a server or a folder that cannot be used.
        """
        assert options.out and options.student and options.teacher.model  # AnnotateSettings
        find_device(options.engine.device)
        server = OpenAITeacher(options.teacher) if options.teacher.url else None
        store = Store(options.out, _made_with(options, task.problems("train", None), prompts))
        try:
            tokenizer = load_tokenizer(options.student)
            add_tags(tokenizer)
            codec = Codec.from_tokenizer(tokenizer, template=options.template)
            if server is None and options.teacher.model != options.student:
                # To see that it is one: the model is loaded when the student is gone.
                load_tokenizer(options.teacher.model)
            store.begin()
        except BaseException:
            store.close()
            raise
        return cls(options, task, problems, prompts, codec, server, store, console, progress)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._store.close()

    def answer(self) -> None:
        """Step 0, by the student: problems that have no response yet, or a wrong one that a
        smaller generation.max_tokens cut off."""
        options = self._options
        cut = cut_off(self._store, self._problems, options.generation.max_tokens)
        verdicts = {number: self._grading(number, answer) for number, answer in cut.items()}
        wrong = [number for number, is_right in verdicts.items() if not is_right()]
        numbers = sorted([*unanswered(self._store, self._problems), *wrong])
        if not numbers:
            return
        settings, note = settle_precision(options.engine)
        engine, _ = load_engine(
            str(options.student), settings, parallel=False, template=options.template
        )
        if note:
            print_line(self._console, note)
        answer(
            self._store,
            self._problems,
            numbers,
            engine,
            options.generation,
            options.seed,
            self._progress,
        )

    def ask_teacher(self) -> None:
        """Steps 1 to 4."""
        given = self._right()
        if not given:
            return
        options = self._options
        run = Run(
            given,
            self._store,
            self._prompts,
            self._teacher(),
            at_once=options.teacher.at_once,
            seed=options.seed,
            console=self._progress,
        )
        self._results |= run.run()

    def finish(self) -> dict[str, Any]:
        """Step 5. Writes kept.jsonl, rejected.jsonl, summary.json and yield.png; returns the
        summary."""
        made = {n: r for n, r in sorted(self._results.items()) if isinstance(r, str)}
        verdicts = {n: grading(self._task, r, self._problems[n - 1]) for n, r in made.items()}
        rows = []
        for number, response in made.items():
            problem = self._problems[number - 1]
            try:
                rows.append(kept_row(problem, response, verdicts[number](), self._codec))
            except LeftOut as reason:
                self._results[number] = reason
        rejected = {n: r for n, r in sorted(self._results.items()) if isinstance(r, LeftOut)}
        folder = self.folder
        write_whole(folder / "kept.jsonl", _lines(rows))
        write_whole(
            folder / "rejected.jsonl",
            _lines(
                {
                    "number": number,
                    "source": self._problems[number - 1].source,
                    "step": reason.step,
                    "reason": reason.reason,
                    "detail": reason.detail,
                }
                for number, reason in rejected.items()
            ),
        )
        summary = summarize(
            len(self._problems),
            list(rejected.values()),
            rows,
            self._store,
            range(1, len(self._problems) + 1),
            self._options.teacher,
        )
        write_json(folder / "summary.json", summary)
        plot_summary(summary, [row["acceleration"] for row in rows], folder / "yield.png")
        if silent := sum(reason.reason == NO_REPLY for reason in rejected.values()):
            print_line(
                self._console,
                f"{silent:,} trajectories got no reply from the teacher: the same command asks "
                "for them again",
            )
        if refused := sum(reason.reason == REFUSED for reason in rejected.values()):
            print_line(
                self._console,
                f"{refused:,} trajectories have a request that the teacher does not take: the same "
                "command makes it again",
            )
        if cut := sum(reason.reason == MAX_TOKENS for reason in rejected.values()):
            print_line(
                self._console,
                f"{cut:,} answers were cut off: the same command with a larger "
                "--generation.max_tokens makes them again",
            )
        return summary

    def _right(self) -> dict[int, Given]:
        """Responses that are right and have lines to work on; the others are left out."""
        answers = {n: answered(self._store, n, p) for n, p in enumerate(self._problems, 1)}
        pending = {number: self._grading(number, answer) for number, answer in answers.items()}
        given: dict[int, Given] = {}
        with Progress(self._progress, "grading", len(answers), "responses") as progress:
            for number in progress.track(answers):
                problem, answer = self._problems[number - 1], answers[number]
                try:
                    if not pending[number]():
                        raise _why_wrong(answer)
                    body, _ = self._codec.prompts.split_end(answer.response)
                    response = split(body)
                    # What step 5 would not keep is not paid for.
                    trained_response(problem, body, self._codec, STEP)
                    given[number] = Given(problem, response)
                except LeftOut as reason:
                    self._results[number] = reason
        return given

    def _grading(self, number: int, answer: Answer) -> Callable[[], bool]:
        """Starts to grade an answer. The student wrote its own after the text of the prompt, which
        may have opened the thinking; one of the data file is whole."""
        problem = self._problems[number - 1]
        opened = "" if problem.data else opened_thinking(self._codec.prompts.text(problem.prompt))
        return grading(self._task, opened + answer.response, problem)

    def _teacher(self) -> Teacher:
        if self._server is not None:
            return self._server
        options = self._options
        settings, _ = settle_precision(options.engine)
        teacher, note = EngineTeacher.load(options.teacher, settings)
        if note:
            print_line(self._console, note)
        return teacher


def _why_wrong(answer: Answer) -> LeftOut:
    if answer.max_tokens is not None:
        return LeftOut(STEP, answer.note)
    if answer.note:
        return LeftOut(STEP, "the prompt leaves no room for an answer", answer.note)
    return LeftOut(STEP, "the answer is not right")


def print_prompts(console: Console, problems: Sequence[Problem], prompts: Prompts) -> None:
    """What the teacher would be asked: about the first problem that has a response, and the texts
    of the later steps, whose places are filled in from replies."""
    found = None
    for problem in problems:
        if problem.data:
            try:
                found = problem, split(problem.data)
                break
            except LeftOut:
                continue
    shown = {}
    if found:
        problem, response = found
        shown["map"] = map_prompt(prompts, problem_text(problem.prompt), response.lines)
    for name, places in PLACES.items():
        filled = {place: f"{{{{{place}}}}}" for place in places}
        text = shown.get(name) or prompts.fill(name, **filled)
        source = f", {found[0].source}" if found and name in shown else ""
        print_line(console, f"----- {name}{source}\n{text}\n")


def _made_with(
    options: AnnotateSettings, problems: Iterable[Problem], prompts: Prompts
) -> dict[str, Any]:
    """What reaches the results, by the name of the option."""
    digest = hashlib.sha256()
    for problem in problems:
        digest.update(json.dumps([problem.prompt, problem.answer, problem.data]).encode())
    teacher, generation = options.teacher, asdict(options.generation)
    del generation["max_tokens"]  # if it grows, what it cut off is made again
    return {
        "data": digest.hexdigest(),
        "student": options.student,
        "generation": generation,
        "template": asdict(options.template),
        "teacher.model": teacher.model,
        "teacher.temperature": teacher.temperature,
        "teacher.max_tokens": teacher.max_tokens,
        "teacher.extra": teacher.extra,
        "teacher.constrain": teacher.constrain,
        "prompts": prompts.digest,
        "seed": options.seed,
    }


def _lines(rows: Iterable[dict[str, Any]]) -> Iterable[str]:
    return (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
