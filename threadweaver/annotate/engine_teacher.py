"""A teacher in our own engine; its replies can be held to their form."""

from __future__ import annotations

import asyncio

from threadweaver.annotate.failures import Refused
from threadweaver.annotate.grammar import Grammars
from threadweaver.annotate.settings import TeacherSettings
from threadweaver.annotate.teacher import Reply, reply_of
from threadweaver.generate.engine import Engine, Generation
from threadweaver.generate.load import load_engine
from threadweaver.generate.options import EngineSettings
from threadweaver.generate.sampler import SamplingParams
from threadweaver.generate.settings import GenerationSettings
from threadweaver.trajectory import Message, TemplateConfig

TEMPERATURE = 0.6
MAX_TOKENS = 4096


class EngineTeacher:
    """See `Teacher`. Steps of the engine run in the event loop, for all open requests together.

    Args:
        engine: whose codec adds no instruction to a user's turn.
        grammars: None: replies are not held to their form.
    """

    def __init__(self, engine: Engine, settings: TeacherSettings, grammars: Grammars | None):
        self._engine, self._grammars = engine, grammars
        temperature = TEMPERATURE if settings.temperature is None else settings.temperature
        self._generation = GenerationSettings(
            mode="sequential",
            max_tokens=settings.max_tokens or MAX_TOKENS,
            sampling=SamplingParams(temperature=temperature),
        )
        self._open: dict[int, tuple[Generation, asyncio.Future[None]]] = {}
        self._driver: asyncio.Task[None] | None = None

    @classmethod
    def load(
        cls, settings: TeacherSettings, engine: EngineSettings
    ) -> tuple[EngineTeacher, str | None]:
        """The teacher that `settings.model` names, and a line to show if its replies are free.

        Raises:
            ValueError: there is no such model, or it cannot be used.
        """
        assert settings.model is not None
        loaded, tokenizer = load_engine(
            settings.model, engine, parallel=False, template=TemplateConfig(instruction="")
        )
        grammars, note = None, None
        if settings.constrain:
            grammars, note = Grammars.of(tokenizer, loaded.codec.end_ids)
        return cls(loaded, settings, grammars), note

    async def ask(self, messages: list[Message], grammar: str, seed: int) -> Reply:
        """See `Teacher`."""
        constraint = self._grammars.constraint(grammar) if self._grammars else None
        try:
            prompt = self._engine.codec.encode_prompt(messages)
            generation = self._engine.add(prompt, self._generation, seed, constraint=constraint)
        except ValueError as error:  # it leaves no room for a reply
            raise Refused(str(error)) from error
        done = asyncio.get_running_loop().create_future()
        self._open[generation.number] = generation, done
        if self._driver is None or self._driver.done():
            self._driver = asyncio.create_task(self._drive())
        await done
        response, end_ids = generation.weaver.response, self._engine.codec.end_ids
        ended = bool(response) and response[-1] in end_ids
        return reply_of(
            self._engine.codec.decode([id for id in response if id not in end_ids]),
            "stop" if ended else "length",
            may_think=constraint is None,
            prompt_tokens=len(prompt),
            completion_tokens=len(response),
        )

    async def close(self) -> None: ...

    async def _drive(self) -> None:
        """Steps until nothing is open."""
        try:
            while self._engine.has_work:
                self._engine.step()
                for number in [n for n, (g, _) in self._open.items() if g.weaver.done]:
                    self._open.pop(number)[1].set_result(None)
                await asyncio.sleep(0)  # who waited may ask again
        except Exception as error:
            for _, done in self._open.values():
                done.set_exception(error)
            self._open.clear()
