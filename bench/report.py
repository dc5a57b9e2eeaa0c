"""Results as a document: `python -m bench report RESULTS_DIR [--out docs/benchmarks.md]`.

From the result files alone, those of RESULTS_DIR and of all folders below it: a summary with one
line for each suite and machine, the pictures, then a section for each machine, in it one for each
suite, of the newest folder that holds it. Several files of a suite in one folder count as one run,
the newest row of each peer first; a ratio is between two rows of one file. No table is wider than
MAX_COLUMNS. Pictures go to images/benchmarks/ beside the document.

Comments by hand stand in the notes, `benchmarks-notes.md` beside `benchmarks.md`, and are copied
in: text before the first heading below the pictures, text under `## MACHINE` or, below it,
`### SUITE` to the section of that name.

A document that is there already is overwritten after a question, or with --overwrite.

Exit codes: 0; 2 for arguments or files that cannot be used.
"""

from __future__ import annotations

import itertools
import math
import re
import shlex
import statistics
import sys
from argparse import ArgumentError
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jsonargparse import ArgumentParser

from bench.plots import Setup, plot_attention, plot_decode, plot_rollout
from bench.record import Record, Row, read_records
from threadweaver.command import check_overwrite, explain, fail

MAX_COLUMNS = 8
# Suites in the order of the document, and the rows of ours that have lines of their own.
SUITES = {
    "attention": ("ours",),
    "decode": ("ours",),
    "train_step": ("ours: trie",),
    "model_step": ("ours: trie",),
    "rollout": ("ours, parallel", "ours, sequential"),
    "engine": ("ours, parallel", "ours, sequential"),
    "layout": ("ours: trie", "ours: trie + block schedule"),
}
# What ours is compared with in the summary: the first of these that was timed in most setups, or,
# where none was, any other peer that was.
SUMMARY_PEERS = {
    "attention": ("FlexAttention", "SDPA dense mask"),
    "decode": ("padded SDPA",),
    "train_step": ("unrolled calls",),
    "model_step": ("unrolled calls, packed", "unrolled calls"),
    "engine": ("transformers generate",),
    "rollout": ("transformers continuous batching", "transformers generate"),
    "layout": ("FlexAttention block mask", "dict trie"),
}
TELLING = ("dtype", "pass", "update", "model")  # keys whose values need no name beside them
PLOTS = {"attention": plot_attention, "decode": plot_decode, "rollout": plot_rollout}
# Columns after the time, where a row has them: heading, and what a value is multiplied by.
FIGURES = {
    "backend": ("backend", None),
    "tflops": ("TFLOP/s", 1),
    "gb_per_s": ("GB/s", 1),
    "roofline": ("% of roofline", 100),
    "floor_ms": ("floor, ms", 1),
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
                known = rows[ours].get("ratios", {})  # where calls differ in work, of their rates
                return known.get(peer, rows[peer]["ms"] / rows[ours]["ms"])
        return None

    def ours(self) -> list[str]:
        """The rows of ours that have lines of their own, the first of them the main one."""
        timed = {peer: row for setup in self.setups() for peer, row in setup.rows.items()}
        listed = [peer for peer in SUITES.get(self.suite, ()) if peer in timed]
        return listed or [peer for peer, row in timed.items() if row["ours"]][:1]

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

    runs = [
        Run(machine, suite, sorted(newest, key=date, reverse=True))
        for (machine, suite), by_folder in folders.items()
        for newest in [max(by_folder.values(), key=lambda files: max(map(date, files)))]
    ]
    return sorted(runs, key=lambda run: (run.machine, *_place(run.suite)))


def document(runs: Sequence[Run], notes: Notes, images: Path, link: str, command: str) -> str:
    """The Markdown text; draws the pictures into `images`, to which `link` leads from the text."""
    lines = ["# Benchmarks", "", *_summary(runs), ""]
    for run in runs:
        name = f"{re.sub(r'[^a-z0-9]+', '-', run.machine.lower()).strip('-')}-{run.suite}.png"
        draw = PLOTS.get(run.suite)
        if draw and draw(run.setups(), images / name):
            lines += [f"![{run.suite} on {run.machine}]({link}/{name})", ""]
            lines += [f"*{run.suite} on {run.machine}*", ""]
    lines += ["## How it is measured", ""]
    lines += [f"Written by `{command}` from the result files; comments by hand from their notes."]
    lines += ["Medians, ± half the interquartile range; peers in the same run, on the same inputs,"]
    lines += ["checked before they are timed.", ""]
    lines += notes.take()
    for machine in dict.fromkeys(run.machine for run in runs):
        here = [run for run in runs if run.machine == machine]
        lines += [f"## {machine}", "", *_where(here), "", *notes.take(machine)]
        for run in here:
            lines += [f"### {run.suite}", "", *notes.take(machine, run.suite), *_section(run)]
    return "\n".join(lines).rstrip() + "\n"


def _summary(runs: Sequence[Run]) -> Iterator[str]:
    """One line for each suite and machine: how many times faster ours is than one peer."""
    rows = []
    for run in sorted(runs, key=lambda run: _place(run.suite)):
        if compared := _summary_ratios(run):
            ours, peer, ratios = compared
            faster = [_number(f(ratios)) for f in (statistics.median, min, max)]
            rows.append([run.suite, run.machine, ours, peer, str(len(ratios)), *faster])
    headings = ["suite", "machine", "ours", "peer", "setups"]
    yield "How many times faster ours is than a peer, over all setups in which both were timed:"
    yield ""
    yield from _table([*headings, "median", "least", "most"], rows)


def _summary_ratios(run: Run) -> tuple[str, str, list[float]] | None:
    """Our main row, the peer of the summary, and a ratio for each setup that has both."""
    setups = run.setups()
    for ours in run.ours()[:1]:
        by_peer = {
            peer: [r for setup in setups if (r := run.ratio(setup, peer, ours)) is not None]
            for peer in dict.fromkeys(p for s in setups for p, row in s.rows.items())
            if not any(s.rows[peer]["ours"] for s in setups if peer in s.rows)
        }
        listed = [peer for peer in SUMMARY_PEERS.get(run.suite, ()) if by_peer.get(peer)]
        if candidates := listed or [peer for peer, ratios in by_peer.items() if ratios]:
            peer = max(candidates, key=lambda peer: len(by_peer[peer]))
            return ours, peer, by_peer[peer]
    return None


def _place(suite: str) -> tuple[int, str]:
    """Where a suite stands in the document; unknown ones come last, by name."""
    order = list(SUITES)
    return (order.index(suite) if suite in order else len(order)), suite


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
    yield from (*_results(run), "")
    setups = run.setups()
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


Columns = dict[str, list[str]]  # by heading; all of one length


def _results(run: Run) -> Iterator[str]:
    """What all lines have in common, then tables with a line for each setup and row of ours: one
    with all columns if they are few, else one of the cases, some of times, some of ratios."""
    setups, ours = run.setups(), run.ours()
    shown = [(setup, peer) for setup in setups for peer in ours if peer in setup.rows]
    if not shown:
        yield "Nothing of ours was timed."
        return
    names = dict.fromkeys(name for setup, _ in shown for name in setup.key)
    keys = {n.replace("_", " "): [_show(setup.key.get(n)) for setup, _ in shown] for n in names}
    times = {"ms": [_time(setup.rows[peer]) for setup, peer in shown]}
    for name, (heading, factor) in FIGURES.items():
        times[heading] = [_figure(setup.rows[peer], name, factor) for setup, peer in shown]
    others = dict.fromkeys(p for s in setups for p in s.rows if p != ours[0])
    ratios = {
        f"x {other}": [
            _times(run.ratio(setup, other, peer)) if other != peer else "" for setup, peer in shown
        ]
        for other in others
    }
    common = [
        f"{heading} {cells[0]}"
        for heading, cells in (keys | {"backend": times["backend"]}).items()
        if heading != "case" and len(set(cells)) == 1 and cells[0]
    ]
    if common:
        yield "; ".join(common) + "."
        yield ""
    keys = {h: cells for h, cells in keys.items() if h == "case" or len(set(cells)) > 1}
    rows = {"row": [peer for _, peer in shown]} if len(ours) > 1 else {}
    if len(set(times["backend"])) == 1:
        del times["backend"]
    times, ratios = ({h: c for h, c in part.items() if any(c)} for part in (times, ratios))
    if len(keys | rows | times | ratios) <= MAX_COLUMNS:
        yield from _columns(keys | rows | times | ratios)
        return
    # What follows from the case has a table of its own; all else that names a line is one column.
    cases = {
        heading: cells
        for heading, cells in keys.items()
        if len(set(zip(keys["case"], cells, strict=True))) == len(set(keys["case"]))
    }
    rest = [
        cells if heading in TELLING else [f"{heading} {cell}" for cell in cells]
        for heading, cells in keys.items()
        if heading not in cases
    ]
    setup = {"setup": [", ".join(parts) for parts in zip(*rest, strict=True)]} if rest else {}
    if len(cases) > 1:
        yield from _columns(cases)
        yield ""
    labels = {"case": keys["case"]} | setup | rows
    yield from _split(labels, times)
    if ratios:
        yield from ("", "`x`: how many times faster ours is than that peer.", "")
        yield from _split(labels, ratios)


def _split(labels: Columns, values: Columns) -> Iterator[str]:
    """Tables of `values`, each with the labels in front, as few and as equally wide as can be;
    without the lines that hold no value."""
    tables = -(-len(values) // (MAX_COLUMNS - len(labels)))
    width = -(-len(values) // tables)
    for start in range(0, len(values), width):
        if start:
            yield ""
        part = dict(list(values.items())[start : start + width])
        full = [any(cells) for cells in zip(*part.values(), strict=True)]
        yield from _columns(
            {h: list(itertools.compress(cells, full)) for h, cells in (labels | part).items()}
        )


def _columns(columns: Columns) -> Iterator[str]:
    """A table; lines that are equal in all columns once."""
    return _table(list(columns), dict.fromkeys(zip(*columns.values(), strict=True)))


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
    parser.add_argument(
        "--overwrite", action="store_true", help="overwrite the document without a question"
    )
    try:
        given = parser.parse_args(arguments)
        check_overwrite([given.out], given.overwrite)
        records = read_records(given.results)
        notes_path = given.out.with_name(f"{given.out.stem}-notes.md")
        notes = Notes(notes_path.read_text(encoding="utf-8") if notes_path.exists() else "")
        images = given.out.parent / "images" / given.out.stem
        images.mkdir(parents=True, exist_ok=True)
        command = f"python -m bench report {shlex.quote(str(given.results))}"
        text = document(newest_runs(records), notes, images, f"images/{given.out.stem}", command)
        given.out.write_text(text, encoding="utf-8")
    except ArgumentError as error:
        return fail(explain(str(error), parser.get_defaults()), 2)
    except (ValueError, OSError) as error:
        return fail(error, 2)
    for heading in sorted(notes.unused):
        print(f"{notes_path}: no results of {' '.join(heading)}: left out", file=sys.stderr)
    print(given.out)
    return 0
