"""What decodes: our engine, or a server (`ServerEngine`); and a response that it decodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Protocol

from threadweaver.generate.rollout import Completion, Rollout
from threadweaver.generate.settings import GenerationSettings
from threadweaver.generate.weaver import RequestId, Weaver
from threadweaver.trajectory import Codec


@dataclass(eq=False)
class Decoding:
    """A response that is being decoded, or is done.

    Attributes:
        prompt: ids, [T].
        seed: of its draws.
        weaver: its state machine.
        completions: of its closed requests.
        steps: engine steps that computed tokens of it; 0 on a server.
        started, ended: when the first request or step began and the last was over, by
            time.perf_counter; 0 until then.
    """

    prompt: list[int] = field(repr=False)
    settings: GenerationSettings
    seed: int
    weaver: Weaver = field(repr=False)
    _: KW_ONLY
    completions: dict[RequestId, Completion] = field(default_factory=dict, repr=False)
    steps: int = 0
    started: float = 0.0
    ended: float = 0.0

    def rollout(self) -> Rollout:
        """The record of it, once its weaver is done."""
        return Rollout(
            self.prompt,
            self.weaver.response,
            [self.completions[id] for id in sorted(self.completions)],
            self.weaver.limits,
            self.steps,
            self.ended - self.started,
        )


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

    def run(
        self, on_step: Callable[[list[Any]], None] | None = None, *, keep: bool = True
    ) -> Sequence[Rollout]: ...
