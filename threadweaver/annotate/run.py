"""All trajectories through the steps that ask the teacher, some at the same time."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from rich.console import Console

from threadweaver.annotate.failures import LeftOut, NoReply, Refused, Step
from threadweaver.annotate.form import Form
from threadweaver.annotate.lines import Response
from threadweaver.annotate.prompts import Prompts
from threadweaver.annotate.store import STEPS, Ask, Store
from threadweaver.annotate.teacher import Reply, Teacher
from threadweaver.annotate.trajectory import Trajectory
from threadweaver.generate.sampler import stream_key
from threadweaver.progress import Progress, print_line
from threadweaver.tasks import Problem
from threadweaver.trajectory import Message, Prompt

NO_REPLY = "the teacher gave no reply"
REFUSED = "the teacher does not take the request"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(Exception):  # noqa: N818 (named for what was found)
    """A signal asked for the end; every reply so far is saved."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class TeacherIsGone(Exception):  # noqa: N818 (named for what was found)
    """Many requests one after the other got no reply, or all of them."""


class _End(Exception):  # noqa: N818 (named for what it is)
    """The run ends before this request."""


@dataclass(frozen=True)
class Given:
    """A right response, taken apart."""

    problem: Problem
    response: Response


class Run:
    """Args:
    given: by number of the problem.
    at_once: trajectories in work.
    """

    def __init__(
        self,
        given: Mapping[int, Given],
        store: Store,
        prompts: Prompts,
        teacher: Teacher,
        *,
        at_once: int,
        seed: int,
        console: Console,
    ):
        self._given, self._store, self._prompts = given, store, prompts
        self._teacher, self._at_once, self._seed = teacher, at_once, seed
        self._console = console
        self._end: Exception | None = None  # why no further request is made
        self._silent = 0  # requests without a reply since the last with one
        self._why_silent = ""
        self._replied = False  # to any request
        self._why_refused = ""  # the first that was not taken
        self._step: dict[int, Step] = {}  # that the last request was of, by number
        self.results: dict[int, str | LeftOut] = {}

    def run(self) -> dict[int, str | LeftOut]:
        """The parallel response of each number, or why there is none.

        Raises:
            Stopped: by a signal. The first lets open requests end, the second does not.
            TeacherIsGone: the last so many requests got no reply, or none did.
            ValueError: the teacher cannot be used, or has never taken a request.
        """
        asyncio.run(self._run())
        if self._silent and not self._replied:
            self._end = self._end or TeacherIsGone(self._why_silent)
        if self._why_refused and not self._store.has_reply:
            self._end = self._end or ValueError(
                f"teacher: takes no request: {self._why_refused}: mend what is sent with each "
                "(teacher.model, teacher.temperature, teacher.max_tokens, teacher.extra)"
            )
        if self._end is not None:
            raise self._end
        return self.results

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._signalled, number)
        rest = iter(self._given.items())
        title, total = "annotating", len(self._given)
        try:
            with Progress(self._console, title, total, "trajectories") as self._progress:
                await asyncio.gather(*(self._work(rest) for _ in range(min(self._at_once, total))))
        finally:
            await self._teacher.close()

    def _signalled(self, number: int) -> None:
        if isinstance(self._end, Stopped):
            raise KeyboardInterrupt
        self._end = Stopped(number)
        print_line(
            self._console,
            "stopping as soon as the open requests have ended; a second signal does not wait",
        )

    async def _work(self, rest: Iterator[tuple[int, Given]]) -> None:
        """One trajectory after another."""
        for number, given in rest:
            try:
                self.results[number] = await self._trajectory(number, given).parallel()
            except LeftOut as reason:
                self.results[number] = reason
            except Refused as error:
                self.results[number] = LeftOut(self._step[number], REFUSED, str(error))
                self._replied = True
                self._why_refused = self._why_refused or str(error)
            except NoReply as error:
                self.results[number] = LeftOut(self._step[number], NO_REPLY, str(error))
                self._silent += 1
                self._why_silent = str(error)
                if self._silent >= 2 * self._at_once:
                    self._end = self._end or TeacherIsGone(self._why_silent)
            except _End:
                return
            except Exception as error:
                # Requests of others that are on their way come to their end, and on disk.
                self._end = self._end or error
                return
            self._progress.update(len(self.results))

    def _trajectory(self, number: int, given: Given) -> Trajectory:
        problem = given.problem
        ask: dict[str, Ask] = {
            step: partial(self._ask, (self._seed, number, i)) for i, step in enumerate(STEPS)
        }
        return Trajectory(
            number,
            problem.source,
            problem_text(problem.prompt),
            given.response,
            self._store,
            self._prompts,
            ask,
        )

    async def _ask(
        self, of: tuple[int, ...], messages: list[Message], form: Form, request: int
    ) -> Reply:
        if self._end is not None:
            raise _End
        number, step = of[1], STEPS[of[2]]
        self._step[number] = step
        reply = await self._teacher.ask(messages, form, stream_key((*of, request)))
        self._silent, self._replied = 0, True
        return reply


def problem_text(prompt: Prompt) -> str:
    """A problem as the teacher sees it."""
    if isinstance(prompt, str):
        return prompt.strip()
    return "\n\n".join(turn["content"].strip() for turn in prompt)
