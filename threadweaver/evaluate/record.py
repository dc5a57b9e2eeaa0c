"""The responses of one mode of an evaluation, of all ranks, in the log of a command."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from threadweaver.generate.decoder import Decoder
from threadweaver.generate.response_log import Key, ResponseLog, response_row
from threadweaver.generate.rollout import Rollout
from threadweaver.generate.settings import GenerationSettings
from threadweaver.shared import Messages, new_name
from threadweaver.tasks import Problem


class Record:
    """Responses by number: `samples` to the first problem, then to the second, and so on. All ranks
    make it together.

    Args:
        log: on the first rank; None on the others, which send it what they decode.

    Attributes:
        elapsed: seconds of decoding that they took, up to the last.
    """

    def __init__(self, log: ResponseLog | None, settings: GenerationSettings, samples: int):
        self._log, self._settings, self._samples = log, settings, samples
        self._sent = Messages(new_name("responses"))
        self.elapsed = log.elapsed(settings.mode) if log else 0.0

    def known(self, decoder: Decoder, problems: Sequence[Problem]) -> Iterator[tuple[int, Rollout]]:
        """Those that are there, with their numbers, one after another; on the first rank.

        Raises:
            LogError: one is not to be had again.
        """
        if self._log is None:
            return
        for i, problem in enumerate(problems):
            numbers = [i * self._samples + j for j in range(self._samples)]
            numbers = [number for number in numbers if self._key(number) in self._log.rows]
            prompt = decoder.codec.encode_prompt(problem.prompt) if numbers else []
            for number in numbers:
                yield (
                    number,
                    self._log.rollout(
                        self._key(number),
                        prompt,
                        self._settings,
                        decoder.codec,
                        decoder.context_length,
                    ),
                )

    def add(self, number: int, rollout: Rollout, text: str, elapsed: float) -> None:
        """Keeps a response of this rank; see `ResponseLog.add`."""
        if self._log is not None:
            self._log.add(self._key(number), rollout, text, elapsed)
        else:
            row = response_row(self._key(number), rollout, text)
            self._sent.send(json.dumps(row))

    def collect(self, elapsed: float) -> None:
        """On the first rank: keeps what the others have sent."""
        if self._log is not None:
            for message in self._sent.receive():
                self._log.add_row(json.loads(message), elapsed)

    def _key(self, number: int) -> Key:
        return Key(self._settings.mode, *divmod(number, self._samples))
