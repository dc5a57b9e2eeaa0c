"""The responses of one mode of an evaluation in the log of a command."""

from __future__ import annotations

from collections.abc import Sequence

from threadweaver.generate.decoder import Decoder
from threadweaver.generate.response_log import Key, ResponseLog
from threadweaver.generate.rollout import Rollout
from threadweaver.generate.settings import GenerationSettings
from threadweaver.tasks import Problem


class Record:
    """Responses by number: `samples` to the first problem, then to the second, and so on.

    Attributes:
        elapsed: seconds of decoding that they took, up to the last.
    """

    def __init__(self, log: ResponseLog, settings: GenerationSettings, samples: int):
        self._log, self._settings, self._samples = log, settings, samples
        self.elapsed = log.elapsed(settings.mode)

    def known(self, decoder: Decoder, problems: Sequence[Problem]) -> dict[int, Rollout]:
        """Those that are there, by number.

        Raises:
            LogError: one is not to be had again.
        """
        found = {}
        for i, problem in enumerate(problems):
            numbers = [i * self._samples + j for j in range(self._samples)]
            numbers = [number for number in numbers if self._key(number) in self._log.rows]
            prompt = decoder.codec.encode_prompt(problem.prompt) if numbers else []
            for number in numbers:
                found[number] = self._log.rollout(
                    self._key(number),
                    prompt,
                    self._settings,
                    decoder.codec,
                    decoder.context_length,
                )
        return found

    def add(self, number: int, rollout: Rollout, text: str, elapsed: float) -> None:
        """Keeps a response; see `ResponseLog.add`."""
        self._log.add(self._key(number), rollout, text, elapsed)

    def _key(self, number: int) -> Key:
        return Key(self._settings.mode, *divmod(number, self._samples))
