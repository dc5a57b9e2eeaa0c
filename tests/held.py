"""What is held of responses that are done, while others are decoded or read from a log."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import ref

import pytest

from threadweaver.generate.decoder import Decoding
from threadweaver.generate.engine import Engine
from threadweaver.generate.response_log import ResponseLog


class Held:
    """Counts the generations of engines that are done, and the rollouts that were made of them or
    of a log.

    Attributes:
        count: of all of them.
        most: that were there at the same time.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.count = self.most = 0
        self._there: list[ref[Any]] = []
        finish = Engine._finish

        def finished(engine: Engine, generation: Any) -> None:
            finish(engine, generation)
            self._note(generation)

        monkeypatch.setattr(Engine, "_finish", finished)
        for kind in (Decoding, ResponseLog):
            monkeypatch.setattr(kind, "rollout", self._noted(kind.rollout))

    def _noted(self, make: Callable[..., Any]) -> Callable[..., Any]:
        def made(*arguments: Any) -> Any:
            rollout = make(*arguments)
            self._note(rollout)
            return rollout

        return made

    def _note(self, one: object) -> None:
        self._there = [ref(one), *(other for other in self._there if other() is not None)]
        self.count += 1
        self.most = max(self.most, len(self._there))
