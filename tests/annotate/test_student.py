"""The student's answers: what is held of them while others are decoded."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from tests.held import Held
from tests.products import CODEC, PROMPTS, RESPONSES, product_model
from threadweaver.annotate.store import Store
from threadweaver.annotate.student import answer, answered
from threadweaver.generate import Engine, GenerationSettings
from threadweaver.generate.sampler import SamplingParams
from threadweaver.tasks import Problem


def test_nothing_is_held_of_an_answer_that_is_in_its_file(tmp_path: Path, monkeypatch):
    problems = [Problem(PROMPTS[n % 2], "", f"f:{n}") for n in range(12)]
    settings = GenerationSettings(max_tokens=300, sampling=SamplingParams(temperature=0))
    engine = Engine(product_model(), CODEC, kv_gigabytes=0.01, max_sequences=2)
    store = Store(tmp_path / "out", {})
    held = Held(monkeypatch)
    answer(store, problems, range(1, 13), engine, settings, 0, Console(quiet=True))
    assert held.count >= 12 and held.most <= 4
    assert [answered(store, n, problems[n - 1]).response for n in (1, 12)] == RESPONSES
    store.close()
