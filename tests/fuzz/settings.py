"""Values of settings: by the type of the default, what must be refused, and what may be."""

from __future__ import annotations

import math
from random import Random
from typing import Any, Literal

import yaml

# Wrong for any number.
NO_NUMBER = [
    "abc",
    "",
    " ",
    "[1, 2]",
    "{a: 1}",
    "--",
    "1,5",
    "0x",
    "é☃",
    "a" * 5000,
    "\ud800",
    "[/b]",
]
WHOLE = ["nan", "inf", "-inf", "0.5", "1e999", "yes", *NO_NUMBER]  # wrong for a whole number
NUMBERS = [
    "-1",
    "0",
    "-0.0",
    "1e-320",
    "1",
    "3",
    "2147483648",
    "1" + "0" * 23,
    "-" + "9" * 30,
    "1e9",
]
BOOLS = ["maybe", "2", "[]", "nan", "é", "tru", "{a: b}"]
TEXTS = [
    *("", " ", "no/such", "/dev/null", "/", "..", "é☃\u202e", "a" * 5000, "[/bold]", "%s{}"),
    *("\ud800", "nan", "null", "[]", "{a: 1}", "- a", "&a [*a]", "!!python/object:os.system", "\0"),
    *("x\ny", "~", "*", "-", "reasoning_gym:", "reasoning_gym:no", "gpt2", "multiplication:"),
]
TABLES = [
    "3",
    "abc",
    "[1]",
    "{1: 2}",
    "{a: {b: {c: 1}}}",
    "{'': 1}",
    "{no_such: 1}",
    "{",
    "nan",
    "{a: .nan}",
]


def value(rng: Random, default: Any) -> tuple[str, Literal["refuse"] | None]:
    """A value as on a command line, and whether it must be refused."""
    if isinstance(default, bool):
        return rng.choice(BOOLS), "refuse"
    if isinstance(default, int | float):
        must_fail = WHOLE if isinstance(default, int) else ["nan", "yes", *NO_NUMBER]
        chosen = rng.choice(must_fail if rng.random() < 0.5 else NUMBERS)
        return chosen, "refuse" if chosen in must_fail else None
    if isinstance(default, dict):
        return rng.choice(TABLES), None
    if isinstance(default, list | tuple):
        return rng.choice(["3", "[]", "[a]", "[1, 2, 3]", "{a: 1}", "abc", "[nan, nan]"]), None
    return rng.choice([*TEXTS, *NUMBERS, *TABLES]), None


def is_large(text: str) -> bool:
    """Whether a value may ask for more work than a test can wait for."""
    try:
        return not -1000 < float(text) < 1000
    except ValueError:
        return False


def means(text: str, saved: Any) -> bool:
    """Whether a value that was saved is the one that was given."""
    if saved == text or str(saved) == text:
        return True
    try:
        read = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        return False
    if isinstance(saved, int | float) and not isinstance(saved, bool):
        try:
            return math.isclose(float(text), saved, rel_tol=1e-9) or float(text) == saved
        except ValueError:
            return False
    return read == saved or (isinstance(read, dict) and str(read) == str(saved))
