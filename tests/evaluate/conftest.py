"""Evaluations of the model that knows two products (tests/products.py)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.products import FACTORS, PROMPTS, save_product_model

GREEDY = "--temperature 0 --kv_gigabytes 0.01 --device cpu --precision fp32 --max_tokens 300"
KNOWN = [(prompt, a * b) for prompt, (a, b) in zip(PROMPTS, FACTORS, strict=True)]


@pytest.fixture(scope="package")
def folder(tmp_path_factory) -> str:
    """Of the model."""
    return save_product_model(tmp_path_factory.mktemp("model"))


def asking(questions: list[tuple[str, int]], model: str, folder: Path) -> Callable[..., list[str]]:
    """Makes the arguments of evaluations on questions and their answers, with all files in a
    folder; options given later win."""
    data = folder / "products.jsonl"
    rows = [{"question": question, "ground_truth": str(answer)} for question, answer in questions]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(*options: str) -> list[str]:
        files = ["--responses", str(folder / "r.jsonl"), "--json", str(folder / "e.json")]
        task = ["--task", str(data), "--task_options", "{held_out: 1, whole_numbers: true}"]
        return ["--model", model, *task, *GREEDY.split(), *files, *options]

    return make
