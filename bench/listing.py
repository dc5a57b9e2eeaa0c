"""`python -m bench list`: the suites there are."""

from __future__ import annotations

from bench.frame import console
from bench.suites import SUITES


def main(arguments: list[str]) -> int:
    for name in SUITES:
        console().print(name)
    return 0
