"""Results as a document: `python -m bench report RESULTS_DIR [--out docs/benchmarks.md]`.

From the result files alone, those of RESULTS_DIR and of all folders below it: a section for each
machine, in it one for each suite, of the newest folder that holds it. Several files of a suite in
one folder count as one run, the newest row of each peer first; a ratio is between two rows of one
file. Pictures go to images/benchmarks/ beside the document.

What a person has to say stands in the notes, `benchmarks-notes.md` beside `benchmarks.md`, and is
copied in: text before the first heading to the top, text under `## MACHINE` or, below it,
`### SUITE` to the section of that name.

Exit codes: 0; 2 for arguments or files that cannot be used.
"""

from __future__ import annotations

import math
import re
import sys
from argparse import ArgumentError
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jsonargparse import ArgumentParser

from bench.plots import Setup, plot_attention, plot_decode, plot_rollout
from bench.record import Record, RecordError, Row, read_records
from threadweaver.command import explain, fail

# Suites in the order of the document, and the rows of ours that have lines of their own.
SUITES = {
    "attention": ("ours",),
    "decode": ("ours",),
    "train_step": ("ours: trie",),
    "rollout": ("ours, parallel", "ours, sequential"),
    "layout": ("ours: trie", "ours: trie + block schedule"),
}
PLOTS = {"attention": plot_attention, "decode": plot_decode, "rollout": plot_rollout}
# Columns after the time, where a row has them: heading, and what a value is multiplied by.
FIGURES = {
    "backend": ("backend", None),
    "tflops": ("TFLOP/s", 1),
    "gb_per_s": ("GB/s", 1),
    "roofline": ("% of roofline", 100),
    "tokens_per_second": ("tokens/s", 1),
    "ms_per_step": ("ms a step", 1),
    "plan_us": ("plan, µs", 1),
    "peak_bytes": ("peak MB", 1e-6),
}


class Run(NamedTuple):
    """The newest run of a suite on a machine: the records of one folder, the newest first."""

    machine: str
    suite: str
    records: list[Record]

    def setups(self) -> list[Setup]:
        """In the order they were first measured; a peer's row is the newest that was timed."""
        merged: dict[Any, Setup] = {}
        for record in reversed(self.records):
            for key, rows in record.by_setup().items():
                setup = merged.setdefault(key, Setup(dict(key), {}))
                setup.rows.update(_timed(record, rows))
        return [setup for setup in merged.values() if setup.rows]

    def ratio(self, setup: Setup, peer: str, ours: str) -> float | None:
        """How many times faster ours was than the peer, in the newest file that timed both."""
        for record in self.records:
            rows = _timed(record, record.by_setup().get(tuple(setup.key.items()), {}))
            if peer in rows and ours in rows:
                return rows[peer]["ms"] / rows[ours]["ms"]
        return None

    def untimed(self) -> Iterator[Row]:
        """The newest row of each setup and peer that no file timed."""
        seen = {(tuple(s.key.items()), peer) for s in self.setups() for peer in s.rows}
        for record in self.records:
            for key, rows in record.by_setup().items():
                for peer, row in rows.items():
                    if (key, peer) not in seen:
                        seen.add((key, peer))
                        yield row


class Notes:
    """What a person wrote, by (machine, suite); ("", "") is the text at the top."""

    def __init__(self, text: str):
        self._parts: dict[tuple[str, str], list[str]] = {}
        machine = suite = ""
        for line in text.splitlines():
            if heading := re.fullmatch(r"(##|###) +(.+?) *", line):
                is_machine = heading[1] == "##"
                machine, suite = (heading[2], "") if is_machine else (machine, heading[2])
                self._parts.setdefault((machine, suite), [])
            else:
                self._parts.setdefault((machine, suite), []).append(line)
        self.unused = {part for part, lines in self._parts.items() if "".join(lines).strip()}

    def take(self, machine: str = "", suite: str = "") -> list[str]:
        self.unused.discard((machine, suite))
        text = "\n".join(self._parts.get((machine, suite), [])).strip()
        return [text, ""] if text else []


def newest_runs(records: Iterable[Record]) -> list[Run]:
    """By machine, then in the order of SUITES."""
    folders: dict[tuple[str, str], dict[Path, list[Record]]] = {}
    for record in records:
        by_folder = folders.setdefault((record.machine, record.suite), {})
        by_folder.setdefault(record.path.parent, []).append(record)

    def date(record: Record) -> str:
        return record.env.get("date", "")

    order = list(SUITES)
    runs = [
        Run(machine, suite, sorted(newest, key=date, reverse=True))
        for (machine, suite), by_folder in folders.items()
        for newest in [max(by_folder.values(), key=lambda files: max(map(date, files)))]
    ]
    return sorted(
        runs,
        key=lambda r: (
            r.machine,
            order.index(r.suite) if r.suite in order else len(order),
            r.suite,
        ),
    )


def document(runs: Sequence[Run], notes: Notes, images: Path, link: str, command: str) -> str:
    """The Markdown text; draws the pictures into `images`, to which `link` leads from the text."""
    lines = ["# Benchmarks", ""]
    lines += [f"Written by `{command}` from the result files; what a person says, by their notes."]
    lines += ["Medians; peers in the same run, on the same inputs, checked before they are timed."]
    lines += ["`x` columns: how many times faster ours is than that peer.", ""]
    lines += notes.take()
    for machine in dict.fromkeys(run.machine for run in runs):
        here = [run for run in runs if run.machine == machine]
        lines += [f"## {machine}", "", *_where(here), "", *notes.take(machine)]
        for run in here:
            lines += [f"### {run.suite}", "", *notes.take(machine, run.suite), *_section(run)]
            name = f"{re.sub(r'[^a-z0-9]+', '-', machine.lower()).strip('-')}-{run.suite}.png"
            draw = PLOTS.get(run.suite)
            if draw and draw(run.setups(), images / name):
                lines += [f"![{run.suite} on {machine}]({link}/{name})", ""]
    return "\n".join(lines).rstrip() + "\n"


def _where(runs: Sequence[Run]) -> Iterator[str]:
    """Device, software, and which commit each suite was measured at."""
    env = runs[0].records[0].env
    software = [f"{name} {v}" for name, v in env.get("versions", {}).items() if v]
    software += [f"Python {env['python']}"] if env.get("python") else []
    software += [f"CUDA {env['cuda']}", f"driver {env['driver']}"] if env.get("driver") else []
    cpu = f"{env['cpu']}, {env['cpu_count']} cores" if env.get("cpu") else ""
    yield "; ".join(filter(None, [cpu, *software])) + "."
    rooflines = [r.env["roofline"] for run in runs for r in run.records if "roofline" in r.env]
    if rooflines:
        rates = rooflines[0]["matmul_tflops"].items()
        products = ", ".join(f"{_number(rate)} TFLOP/s in {dtype}" for dtype, rate in rates)
        copy = _number(rooflines[0]["copy_gb_per_s"])
        yield ""
        yield f"Roofline: a copy at {copy} GB/s; a matrix product at {products}."
    yield ""
    yield from _table(
        ["suite", "date", "commit", "command"],
        (
            [
                run.suite,
                record.env.get("date", "")[:10],
                (record.env.get("commit") or "")[:9] + (" +" if record.env.get("dirty") else ""),
                f"`{record.env.get('command', '')}`",
            ]
            for run in runs
            for record in run.records
        ),
    )
    yield ""
    yield "A commit with a + had uncommitted changes beside it."


def _section(run: Run) -> Iterator[str]:
    setups = run.setups()
    if not setups:
        yield "Nothing was timed."
    else:
        yield from _results(run, setups)
    yield ""
    everywhere = {peer: why for r in run.records for peer, why in r.env.get("absent", {}).items()}
    skipped, bad = _untimed(run, setups, skipped=True), _untimed(run, setups, skipped=False)
    absent = [*(f"- {peer}: {why}" for peer, why in everywhere.items()), *skipped]
    for title, lines in (("Not right", bad), ("Absent", absent)):
        if lines:
            yield from (f"{title}:", "", *lines, "")


def _untimed(run: Run, setups: Sequence[Setup], skipped: bool) -> list[str]:
    """Peers, reasons and the number of setups; a reason that differs in a number only is one."""
    timed = {peer for setup in setups for peer in setup.rows}
    counts: dict[tuple[str, str], tuple[str, int]] = {}
    for row in run.untimed():
        # A row of ours that is skipped here and timed there is another name for one that is shown.
        another_name = skipped and row["ours"] and row["peer"] in timed
        if (row["status"] == "skipped") != skipped or another_name:
            continue
        reason = row.get("reason") or ""
        key = row["peer"], re.sub(r"\d[\d.,]*", "", reason)
        first, n = counts.get(key, (reason, 0))
        counts[key] = first, n + 1
    return [f"- {p}: {why} ({n} setup{'s' * (n > 1)})" for (p, _), (why, n) in counts.items()]


def _results(run: Run, setups: Sequence[Setup]) -> Iterator[str]:
    """What all setups have in common, then a table with a line for each setup and row of ours."""
    names = list(dict.fromkeys(name for s in setups for name in s.key))
    fixed = [n for n in names if len({str(s.key.get(n)) for s in setups}) == 1]
    if fixed and len(setups) > 1:
        yield "; ".join(f"{n.replace('_', ' ')} {_show(setups[0].key[n])}" for n in fixed) + "."
        yield ""
    else:
        fixed = []
    keys = [n for n in names if n not in fixed]
    shown = [
        (setup, peer) for setup in setups for peer in _ours(run.suite, setup) if peer in setup.rows
    ]
    named = len({peer for _, peer in shown}) > 1
    others = list(
        dict.fromkeys(p for s in setups for p in s.rows if p != SUITES.get(run.suite, (None,))[0])
    )
    rows = [
        [
            *(_show(setup.key.get(n)) for n in keys),
            *([peer] if named else []),
            _time(setup.rows[peer]),
            *(_figure(setup.rows[peer], name, factor) for name, (_, factor) in FIGURES.items()),
            *(_times(run.ratio(setup, other, peer)) if other != peer else "" for other in others),
        ]
        for setup, peer in shown
    ]
    headings = [
        *(n.replace("_", " ") for n in keys),
        *(["row"] if named else []),
        "ms",
        *(heading for heading, _ in FIGURES.values()),
        *(f"x {other}" for other in others),
    ]
    kept = [i for i in range(len(headings)) if any(row[i] for row in rows)]
    yield from _table([headings[i] for i in kept], ([row[i] for i in kept] for row in rows))


def _ours(suite: str, setup: Setup) -> Sequence[str]:
    ours = [peer for peer, row in setup.rows.items() if row["ours"]]
    return SUITES.get(suite) or ours[:1]


def _timed(record: Record, rows: dict[str, Row]) -> dict[str, Row]:
    """The rows that were right and timed; `roofline` only where one was measured beside them
    (before that, the entry was another share)."""
    measured = "roofline" in record.env
    return {
        peer: row if measured else {k: v for k, v in row.items() if k != "roofline"}
        for peer, row in rows.items()
        if row["status"] == "ok"
    }


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(headings)} |"
    yield "|" + "---|" * len(headings)
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', '/') for cell in row)} |"


def _time(row: Row) -> str:
    return f"{_number(row['ms'])} ± {_number(row['iqr_ms'] / 2)}"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else _number(ratio)


def _figure(row: Row, name: str, factor: float | None) -> str:
    value = row.get(name)
    return "" if value is None else _number(value * factor) if factor else str(value)


def _show(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return _number(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def _number(x: float) -> str:
    """Two significant digits below 10, whole numbers from 100 on."""
    if x == 0 or not math.isfinite(x):
        return f"{x:g}"
    digits = max(0, 1 - math.floor(math.log10(abs(x)))) if abs(x) < 10 else int(abs(x) < 100)
    return f"{x:,.{digits}f}"


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    parser = ArgumentParser(prog="python -m bench report", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("results", type=Path, help="folder of result files, or of such folders")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks.md"), help="the document")
    try:
        given = parser.parse_args(arguments)
        records = read_records(given.results)
        notes_path = given.out.with_name(f"{given.out.stem}-notes.md")
        notes = Notes(notes_path.read_text(encoding="utf-8") if notes_path.exists() else "")
        images = given.out.parent / "images" / given.out.stem
        images.mkdir(parents=True, exist_ok=True)
        command = f"python -m bench report {given.results}"
        text = document(newest_runs(records), notes, images, f"images/{given.out.stem}", command)
        given.out.write_text(text, encoding="utf-8")
    except ArgumentError as error:
        return fail(explain(str(error), parser.get_defaults()), 2)
    except (RecordError, OSError) as error:
        return fail(error, 2)
    for heading in sorted(notes.unused):
        print(f"{notes_path}: no results of {' '.join(heading)}: left out", file=sys.stderr)
    print(given.out)
    return 0
