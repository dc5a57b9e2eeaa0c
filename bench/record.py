"""Result files: writing them, and reading them for reports and comparisons.

    {"env": {"benchmark": "decode", "device": ..., "key": [...]}, "rows": [{...}, ...]}

`env.key` names the entries of a row that identify its setup. Older files have no `env.key`; their
rows' keys are the entries before `peer`.
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

Row = dict[str, Any]
Setup = tuple[tuple[str, Any], ...]


class RecordError(ValueError):
    """A file or folder without results; the message names it."""


class DamagedRecordError(RecordError):
    """A result file with a row that cannot be read."""


class Record(NamedTuple):
    """One run of one suite."""

    path: Path
    env: Row
    rows: list[Row]

    @property
    def suite(self) -> str:
        return self.env["benchmark"]

    @property
    def machine(self) -> str:
        """The device; of a CPU also the number of threads and the instruction set it is limited
        to, if any."""
        if self.env.get("device_type") == "cuda":
            return self.env["device"]
        held = self.env.get("held_to", {}).get("TW_CPU")
        threads = f"{self.env['device']}, {self.env.get('threads', '?')} threads"
        return f"{threads}, held to {held.upper()}" if held else threads

    def setup(self, row: Row) -> Setup:
        """The key of a row's setup, as pairs (name, value)."""
        names = self.env.get("key") or list(itertools.takewhile(lambda name: name != "peer", row))
        return tuple((name, row.get(name)) for name in names)

    def by_setup(self) -> dict[Setup, dict[str, Row]]:
        """The rows by setup and peer, in the order they were measured."""
        setups: dict[Setup, dict[str, Row]] = {}
        for row in self.rows:
            setups.setdefault(self.setup(row), {})[row["peer"]] = row
        return setups


def write_json(path: Path, content: Any) -> None:
    """Replaces a JSON file in one step: a reader never sees a part of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def read_record(path: Path) -> Record:
    """One result file.

    Raises:
        RecordError: it is missing, not JSON or not a result file; says which.
    """
    try:
        if path.is_fifo():
            raise OSError("is a pipe; name a file")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecordError(f"{path}: {error.strerror or error}") from error
    except RecursionError as error:
        raise RecordError(f"{path}: not a result: nested too deeply") from error
    except ValueError as error:
        raise RecordError(f"{path}: not JSON: {error}") from error
    if not is_record(content):
        raise RecordError(f"{path}: not a result of python -m bench run: no env.benchmark, or rows")
    for number, row in enumerate(content["rows"], 1):
        if fault := _fault(row):
            raise DamagedRecordError(f"{path}: row {number}: {fault}; run the benchmark again")
    return Record(path, content["env"], content["rows"])


def read_records(folder: Path) -> list[Record]:
    """The result files of a folder and all folders below it, in the order of their paths; other
    JSON files are ignored.

    Raises:
        RecordError: there is none, or a damaged one.
    """
    records = [r for path in sorted(folder.rglob("*.json")) if (r := _record_or_none(path))]
    if not records:
        raise RecordError(f"{folder}: holds no result of python -m bench run")
    return records


def is_record(content: Any) -> bool:
    """Whether parsed JSON has the form of a result file."""
    if not (isinstance(content, dict) and isinstance(content.get("env"), dict)):
        return False
    rows = content.get("rows")
    return (
        {"benchmark", "device"} <= set(content["env"])
        and isinstance(rows, list)
        and all(isinstance(row, dict) and {"peer", "ours", "status"} <= set(row) for row in rows)
    )


def _record_or_none(path: Path) -> Record | None:
    try:
        return read_record(path)
    except DamagedRecordError:
        raise
    except RecordError:
        return None


def _fault(row: Row) -> str | None:
    """What is wrong with a row, as a clause: names are texts, times positive numbers."""
    for name in ("peer", "status"):
        if not isinstance(row[name], str):
            return f"{name} is {row[name]!r:.40}, not a text"
    if row["status"] != "ok":
        return None
    for name, least in (("ms", 0), ("iqr_ms", None), ("repeats", 0)):
        value = row.get(name)
        if not _is_number(value) or value < 0 or value == least:
            return f"{name} is {value!r:.40}, not a positive number"
    samples = row.get("samples_ms") or []
    if not isinstance(samples, list) or not all(_is_number(x) and x > 0 for x in samples):
        return "samples_ms holds something other than positive numbers"
    return None


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
