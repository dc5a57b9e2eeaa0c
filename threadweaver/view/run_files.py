"""What the files of a run say, finished or not.

A run writes while it is read: what is not there yet is left out, and the last line of metrics.jsonl
may be half a line. Anything else that cannot be read is counted and named, never fatal.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from threadweaver.lock import is_held

# What a run's folder holds, in the order in which it is made; each may be a run of its own.
STAGES = ("", "sft", "self_train", "self_train/sft", "rl")
MOST = 1e300  # of a figure: a whole number in JSON may be larger than any float
MOST_SAMPLES = 4  # of each kind
MOST_CHARACTERS = 6000  # of a sample

Json = dict[str, Any]


class Tally(NamedTuple):
    """Counts of the rollouts in a chunk; `first`: by the first breach of each, right or not."""

    rollouts: int
    wrong: int
    malformed: int
    first: Counter[str]


def _json(path: Path) -> Any:
    return json.loads(path.read_bytes())


@dataclass
class Damage:
    """Files and lines that could not be read, as lines to show."""

    lines: list[str] = field(default_factory=list)

    def read(self, path: Path, root: Path, read: Callable[[Path], Any] = _json) -> Any:
        """What is read from a JSON file, by default all; None if it is not there or damaged."""
        try:
            return read(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            self.add(path, root, " ".join(str(error).split()))
            return None

    def add(self, path: Path, root: Path, what: str) -> None:
        self.lines.append(f"{path.relative_to(root)}: {what[:200]}")


def is_run(folder: Path) -> bool:
    """Whether a run was started in it."""
    return (folder / "config.yaml").is_file()


def read_run(root: Path) -> Json:
    """All that the page of a run shows."""
    damage = Damage()
    stages = [_stage(root, name, damage) for name in STAGES if not name or is_run(root / name)]
    stages = [stage for stage in stages if stage["name"] or stage["steps"] or len(stages) == 1]
    return {
        "stages": stages,
        "table": _evaluations(root, damage),
        "rejects": _rejects(root, damage),
        "samples": _samples(root, damage),
        "config": (root / "config.yaml").read_text(encoding="utf-8", errors="replace"),
        "finished": (root / "summary.json").exists(),
        "running": is_held(root),
        "damaged": damage.lines,
    }


def read_metrics(path: Path, root: Path, damage: Damage) -> tuple[list[Any], dict[str, list[Any]]]:
    """Steps, and the figures of each step by name; None where a step has none or it is not finite.
    Lines that are no record are left out and counted."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], {}
    except OSError as error:
        damage.add(path, root, str(error.strerror))
        return [], {}
    records, bad = [], []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not _is_number(record["step"]):
                raise ValueError
            records.append(record)
        except (ValueError, TypeError, KeyError, RecursionError):
            if number < len(lines):  # what follows the last newline is still being written
                bad.append(number)
    if bad:
        listed = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
        lines_word = "1 line that is" if len(bad) == 1 else f"{len(bad)} lines that are"
        damage.add(path, root, f"{lines_word} no record of a step, left out: {listed}")
    names = dict.fromkeys(name for record in records for name in record)
    figures = {
        name: [record.get(name) if _is_number(record.get(name)) else None for record in records]
        for name in names
        if name not in ("step", "epoch")
    }
    shown = {name: column for name, column in figures.items() if any(v is not None for v in column)}
    return [record["step"] for record in records], shown


def _stage(root: Path, name: str, damage: Damage) -> Json:
    folder = root / name
    steps, figures = read_metrics(folder / "metrics.jsonl", root, damage)
    not_finite = sorted(path.name for path in folder.glob("nan-step-*"))
    return {
        "name": name,
        "finished": (folder / "summary.json").exists(),
        "steps": steps,
        "figures": figures,
        "not_finite": not_finite,
    }


def _evaluations(root: Path, damage: Damage) -> list[Json]:
    """The held-out problems after each stage of a pipeline, by mode."""
    rows = []
    for stage in ("sft", "self_train", "rl"):
        found = damage.read(root / "evaluation" / f"{stage}.json", root)
        for mode in ("parallel", "sequential"):
            means = found.get(mode) if isinstance(found, dict) else None
            if isinstance(means, dict):
                figures = {n: v for n, v in means.items() if _is_number(v)}
                rows.append({"stage": stage, "mode": mode, **figures})
    return rows


def _rejects(root: Path, damage: Damage) -> Json | None:
    """Why self-training left rollouts out, by its selection or, until there is one, so far."""
    folder = _self_training(root)
    selection = damage.read(folder / "selection.json", root)
    if isinstance(selection, dict):
        names = ("rollouts", "kept", "rejected", "violations")
        kinds = int, int, dict, dict
        found = zip(names, kinds, strict=True)
        if all(isinstance(selection.get(name), kind) for name, kind in found):
            counts = {name: _counts(selection[name]) for name in names[2:]}
            return {name: selection[name] for name in names} | counts | {"so_far": False}
        damage.add(folder / "selection.json", root, "is not what a run wrote")
    read = (damage.read(path, root, _tally) for path in _chunks(folder))
    tallies: list[Tally] = [tally for tally in read if tally is not None]
    rollouts = sum(tally.rollouts for tally in tallies)
    if not rollouts:
        return None
    wrong = sum(tally.wrong for tally in tallies)
    malformed = sum(tally.malformed for tally in tallies)
    first = sum((tally.first for tally in tallies), Counter[str]())
    return {
        "rollouts": rollouts,
        "kept": rollouts - wrong - malformed,
        "rejected": {"wrong": wrong, "malformed": malformed},
        "violations": dict(first.most_common(10)),
        "so_far": True,
    }


def _tally(path: Path) -> Tally:
    """Of a chunk. All chunks together may not fit in memory, and a watched run is read often."""
    return _tally_once(path, path.stat().st_mtime_ns)


@cache
def _tally_once(path: Path, written: int) -> Tally:
    rows = _rollouts(_json(path))
    wrong = sum(not row.get("correct") for row in rows)
    malformed = sum(bool(row.get("correct") and _breaches(row)) for row in rows)
    first = Counter(lines[0].partition(": ")[2] for lines in map(_breaches, rows) if lines)
    return Tally(len(rows), wrong, malformed, first)


def _samples(root: Path, damage: Damage) -> list[Json]:
    """Responses of the newest evaluation and of the newest chunk; what went wrong comes first."""
    evaluations = list((root / "evaluation").glob("*-parallel.json"))
    groups = evaluations, _chunks(_self_training(root))
    return [
        sample
        for group in groups
        if group
        for sample in _samples_of(max(group, key=_age), root, damage)
    ]


def _samples_of(path: Path, root: Path, damage: Damage) -> list[Json]:
    taken: dict[str, list[Json]] = {"malformed": [], "wrong": [], "right": []}
    for number, row in enumerate(_rollouts(damage.read(path, root)), 1):
        breaches, response = _breaches(row), row.get("response")
        kind = "malformed" if breaches else "right" if row.get("correct") else "wrong"
        if len(taken[kind]) == MOST_SAMPLES or not isinstance(response, str):
            continue
        ask = row.get("question")
        taken[kind].append(
            {
                "file": str(path.relative_to(root)),
                "row": number,
                "kind": kind,
                "ask": ask if isinstance(ask, str) else json.dumps(ask, ensure_ascii=False),
                "response": response[:MOST_CHARACTERS],
                "cut": len(response) > MOST_CHARACTERS,
                "breaches": breaches,
            }
        )
    return [sample for samples in taken.values() for sample in samples]


def _self_training(root: Path) -> Path:
    """The folder of self-training: this one, or a stage."""
    return root / "self_train" if is_run(root / "self_train") else root


def _chunks(folder: Path) -> list[Path]:
    return sorted((folder / "rollouts").glob("chunk-*.json"))


def _rollouts(value: Any) -> list[Json]:
    rows = value.get("rollouts") if isinstance(value, dict) else value
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _breaches(row: Json) -> list[str]:
    listed = row.get("violations")
    return list(map(str, listed)) if isinstance(listed, list) else []


def _counts(value: Json) -> Json:
    return {name: n for name, n in value.items() if _is_number(n)}


def _age(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # replaced at this moment
        return 0.0


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and -MOST < value < MOST  # neither NaN nor infinite
