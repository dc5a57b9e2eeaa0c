"""The benchmarks there are, by name; each is imported when it is asked for."""

from __future__ import annotations

import importlib
from typing import Any

from bench.frame import Suite

SUITES = {
    "layout": "bench.layout",
    "attention": "bench.attention",
    "decode": "bench.decode",
    "rollout": "bench.rollout",
    "train_step": "bench.train_step",
}


def load_suite(name: str) -> Suite[Any, Any]:
    """The suite of a name in SUITES."""
    return importlib.import_module(SUITES[name]).SUITE
