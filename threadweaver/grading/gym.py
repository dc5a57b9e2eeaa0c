"""Answers graded by the scorers of reasoning-gym, some of which evaluate what they are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def build_scorer(dataset: str, options: dict[str, Any]) -> Callable[[str, dict[str, Any]], bool]:
    """A function (answer, problem) -> whether it gets the full mark, for a `Judge` to call."""
    import reasoning_gym

    scorer = reasoning_gym.create_dataset(dataset, seed=0, size=1, **options)
    return lambda answer, entry: scorer.score_answer(answer, entry) >= 1
