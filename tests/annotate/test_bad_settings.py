"""Whatever value a setting gets: one line and exit code 2, or the work is done."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from tests.annotate.problems import gym_rows, save_student, write_rows
from tests.annotate.stub import StubServer
from tests.fuzz.settings import is_large, value
from tests.fuzz.verdict import Input, Outcome, fault, run
from threadweaver.annotate.__main__ import _parser

pytest.importorskip("openai")
pytest.importorskip("math_verify")
pytest.importorskip("reasoning_gym")

DEFAULTS = _parser().get_defaults()
# One of a plain server, whose value is not what is tried.
FREE = ("teacher.url", "teacher.timeout", "teacher.retries")


def setting(rng: Random, fixed: dict[str, str], out: Path) -> Input:
    name = rng.choice([n for n in [*DEFAULTS.keys()] if n not in FREE])
    given, must = value(rng, DEFAULTS[name])
    arguments = [f"--{n}={v}" for n, v in fixed.items() if n != name]

    def effect(_: Outcome) -> str | None:
        if name in ("out", "dry_run"):
            return None
        kept = (out / "kept.jsonl").read_text().splitlines()
        return None if len(kept) == 1 else f"{len(kept)} rows are kept"

    if name == "out":
        given = str(out.parent / "deep" / given.strip("/"))
    return Input(
        f"setting {name}={given!a}"[:300],
        "annotate",
        [*arguments, f"--{name}={given}"],
        must=must,
        names=(*name.split("."), "option", given[:30]),
        endless=is_large(given),
        effect=effect,
        unbegun=out,
    )


def tried(folder: Path, numbers: range) -> list[str]:
    """A line for each input that ended as it must not."""
    fixed = {
        "data": write_rows(gym_rows(1), folder / "data.jsonl"),
        "student": save_student(folder / "student"),
        "teacher.model": "stub",
        "teacher.retries": "0",
    }
    faults = []
    with StubServer() as server:
        for number in numbers:
            out = folder / f"{number}" / "out"
            given = {**fixed, "teacher.url": server.url, "out": str(out)}
            tried = setting(Random(f"{number}"), given, out)
            outcome = run(tried, folder / f"{number}" / "current")
            if wrong := fault(tried, outcome, folder / f"{number}" / "current"):
                faults.append(f"input {number}: {tried.kind}: {wrong}\n    {outcome.stderr[:1000]}")
    return faults


@pytest.fixture(autouse=True)
def no_plot(monkeypatch):
    monkeypatch.setattr("threadweaver.annotate.annotation.plot_summary", lambda *_: None)


def test_thirty_bad_settings_are_refused_in_one_line_or_done_right(tmp_path):
    faults = tried(tmp_path, range(30))
    assert not faults, "\n".join(faults)


@pytest.mark.slow
def test_five_hundred_bad_settings_are_refused_in_one_line_or_done_right(tmp_path):
    faults = tried(tmp_path, range(30, 530))
    assert not faults, "\n".join(faults)
