"""How far the responses of all ranks are, shown by the first."""

from __future__ import annotations

from time import perf_counter
from typing import Self

from rich.console import Console

from threadweaver import ranks
from threadweaver.progress import DecodesTokens, Pace, ResponsesProgress
from threadweaver.shared import SharedCount, new_name

SECONDS = 0.5  # between two times that a rank tells the others


class SharedProgress(ResponsesProgress):
    """As ResponsesProgress, for a rank that gives the counts of its own responses. All ranks make
    it together.

    Attributes:
        seconds: from the start until the last response of this rank was decoded.
    """

    def __init__(self, console: Console, title: str, total: int, engine: DecodesTokens):
        super().__init__(console, title, total, engine)
        name = new_name("progress")
        # Responses, those that are graded, tokens: of all ranks; of this one; of it in the sums.
        self._sums = [SharedCount(f"{name}/{i}") for i in range(3)]
        self._own, self._in = [0, 0, 0], [0, 0, 0]
        self._pace = Pace(SECONDS)
        self.seconds = 0.0

    def __enter__(self) -> Self:
        self._started = perf_counter()
        return super().__enter__()

    def __exit__(self, kind: type[BaseException] | None = None, *exc) -> None:
        if ranks.size() > 1 and kind is None:
            self._tell()
        super().__exit__(kind, *exc)

    def decoded(self, count: int) -> None:
        """Reports how many this rank has decoded by now."""
        if count > self._own[0]:
            self.seconds = perf_counter() - self._started
        self._own[0] = count
        if ranks.size() == 1:
            super().decoded(count)
        elif self._pace.due():
            self._tell()

    def graded(self, count: int) -> None:
        """Reports how many this rank has graded by now; it has decoded all of its own."""
        self._own[1] = count
        if ranks.size() == 1:
            super().graded(count)
        elif self._pace.due(wanted=count == self._own[0]):
            self._tell()

    def _tell(self) -> None:
        """Adds what this rank did since it did so last, and shows the sums."""
        self._own[2] = self._engine.decoded_tokens - self._tokens_before
        news = [now - before for now, before in zip(self._own, self._in, strict=True)]
        self._in = list(self._own)
        done, graded, tokens = (s.add(n) for s, n in zip(self._sums, news, strict=True))
        if ranks.is_first():
            rate = f"{tokens / max(perf_counter() - self._started, 1e-9):,.0f} tokens/s"
            self.update(done, f"{rate}, {graded:,} graded" if graded else rate)
