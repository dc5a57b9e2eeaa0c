"""What evaluation needs of something that decodes: our engine, or a server (`ServerEngine`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from threadweaver.generate.rollout import Rollout
from threadweaver.generate.settings import GenerationSettings
from threadweaver.generate.weaver import Weaver
from threadweaver.trajectory import Codec


class Decoding(Protocol):
    """A response that is being decoded, or is done."""

    @property
    def weaver(self) -> Weaver: ...

    def rollout(self) -> Rollout:
        """The record of it, once its weaver is done."""
        ...


class Decoder(Protocol):
    """Attributes and methods are those of `Engine`.

    What `run` hands to `on_step` are the tokens that a step decoded; a server's step is the reply
    to one request.
    """

    codec: Codec
    context_length: int
    decoded_tokens: int
    max_sequences: int

    @property
    def unfinished(self) -> int: ...

    @property
    def has_room(self) -> bool: ...

    def add(
        self, prompt: Iterable[int], settings: GenerationSettings, seed: int = 0
    ) -> Decoding: ...

    def check(self, prompt: Iterable[int], settings: GenerationSettings) -> int: ...

    def context_note(self, settings: GenerationSettings, room: int) -> str | None: ...

    def run(self, on_step: Callable[[list[Any]], None] | None = None) -> Sequence[Rollout]: ...
