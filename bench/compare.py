"""What changed between two results: `python -m bench compare BEFORE AFTER [--tolerance 0.1]`.

BEFORE and AFTER are result files, or folders whose files are matched by name. Rows are matched by
suite, setup and peer.

    B/A       time after over time before, by the fastest sample of each: other load only slows
              samples down, so the fastest varies least (medians, where a file has no samples)
    drift     the median B/A of the setup's peers that are not ours: their code is unchanged, so it
              is the machine's
    change    B/A over drift
    noise     three standard errors of `change`

The variance of the logarithm of `change` is a sum of independent parts: the error of both times
(from the spread of their fastest quarter of samples); the disagreement of the setup's peers about
the drift; the scatter between runs, robustly estimated from all setups (of our rows about their
peer's median change, or of the other peers, whichever is smaller, so that a regression of some rows
does not raise its own threshold); and 0.4 of the drift, which does not affect all calls equally.

A row is slower if its change is above the tolerance and above its noise. A peer of ours is also
compared over all setups together, by its median change, if there are three setups or more: a change
too small for a single row shows there. A row of ours that was right and is now wrong or failed is a
regression as well.

Exit codes: 0; 1 for a regression of ours; 2 for arguments or files that cannot be used.
"""

from __future__ import annotations

import math
import statistics
from argparse import ArgumentError
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from jsonargparse import ArgumentParser
from rich.table import Table

from bench.record import Record, RecordError, Row, Setup, read_record, read_records
from bench.table import console
from threadweaver.command import explain, fail

ERRORS = 3  # noise, in standard errors
LEAST_SCATTER = 0.05  # standard deviation of log(ratio) between two runs of one call, at least
FEWEST_FOR_SCATTER = 5  # rows from which the scatter is estimated, at least
FEWEST_FOR_PEER = 3  # setups over which a peer is compared, at least
DRIFT_DOUBT = 0.4  # standard error of log(drift) over log(drift)
# Standard error of the fastest sample over the distance of the first quartile from it.
ERROR_OF_QUARTER = 0.5
SIGMA_OF_IQR, SIGMA_OF_MAD = 1 / 1.349, 1.4826  # of normally distributed samples
MEDIAN_OVER_MEAN = 1.2533  # ratio of the standard errors of median and mean


class Change(NamedTuple):
    """One row, or one peer over all setups, before and after.

    Attributes:
        before, after: milliseconds of the fastest sample; None for a peer over all setups.
        ratio: time after over before.
        drift: the part of it that is the machine's.
        error: standard error of log(ratio / drift).
    """

    suite: str
    setup: str
    peer: str
    ours: bool
    before: float | None
    after: float | None
    ratio: float
    drift: float
    error: float

    @property
    def change(self) -> float:
        return self.ratio / self.drift

    @property
    def noise(self) -> float:
        """As a factor: a change by less, up or down, is not significant."""
        return math.exp(ERRORS * self.error)

    def slower(self, tolerance: float) -> bool:
        return self.change > max(1 + tolerance, self.noise)

    def faster(self, tolerance: float) -> bool:
        return 1 / self.change > max(1 + tolerance, self.noise)


class Time(NamedTuple):
    """Milliseconds of a call, and their relative standard error."""

    ms: float
    error: float


class Pair(NamedTuple):
    """One row in both runs."""

    ours: bool
    before: Time
    after: Time

    @property
    def log_ratio(self) -> float:
        return math.log(self.after.ms / self.before.ms)

    @property
    def error(self) -> float:
        """Standard error of log_ratio."""
        return math.hypot(self.before.error, self.after.error)


class Drift(NamedTuple):
    """Logarithm of the machine's factor, and its standard error."""

    log: float
    error: float


class Comparison(NamedTuple):
    """Two runs of one suite.

    Attributes:
        changes: of the rows that both runs timed, then of our peers over all setups.
        broken: rows of ours that were right before and are not after, with the reason.
        missing: rows that only one of the two runs timed.
        warnings: why the two may not be comparable.
    """

    changes: list[Change]
    broken: list[str]
    missing: list[str]
    warnings: list[str]


def compare(before: Record, after: Record) -> Comparison:
    """Compares two records, row by row."""
    suite, names = after.suite, _varying(before, after)
    olds, news = before.by_setup(), after.by_setup()
    broken, missing = [], []
    pairs: dict[Setup, dict[str, Pair]] = {}
    for setup in {**olds, **news}:
        old, new = olds.get(setup, {}), news.get(setup, {})
        for peer in {**old, **new}:
            a, b = old.get(peer), new.get(peer)
            label = " ".join((suite, _label(setup, names), peer))
            if a and b and _timed(a) and _timed(b):
                pairs.setdefault(setup, {})[peer] = Pair(b["ours"], *_times(a, b))
            elif _timed(a) and b and b["ours"] and b["status"] in ("wrong", "failed"):
                broken.append(f"{label}: {b['status']}: {b.get('reason')}")
            elif _timed(a) or _timed(b):
                where, other = ("before", b) if _timed(a) else ("after", a)
                why = f": {other['status']}, {other.get('reason')}" if other else ""
                missing.append(f"{label}: only {where}{why}")
    labels = {setup: _label(setup, names) for setup in pairs}
    return Comparison(
        _changes(suite, pairs, labels), broken, missing, list(_warnings(before, after))
    )


def _changes(
    suite: str, pairs: dict[Setup, dict[str, Pair]], labels: dict[Setup, str]
) -> list[Change]:
    others = {s: [pair for pair in row.values() if not pair.ours] for s, row in pairs.items()}
    of_others = [pair.log_ratio for row in others.values() for pair in row]
    overall = statistics.median(of_others) if of_others else 0.0
    drifts = {setup: _drift(row, overall) for setup, row in others.items()}

    by_peer: dict[str, dict[Setup, float]] = {}
    for setup, row in pairs.items():
        for peer, pair in row.items():
            if pair.ours:
                by_peer.setdefault(peer, {})[setup] = pair.log_ratio - drifts[setup].log
    medians = {peer: statistics.median(logs.values()) for peer, logs in by_peer.items()}
    residuals = [log - medians[peer] for peer, logs in by_peer.items() for log in logs.values()]
    scatter = _scatter(residuals, of_others)

    changes = []
    for setup, row in pairs.items():
        for peer, pair in row.items():
            drift = drifts[setup]
            times = pair.before.ms, pair.after.ms, math.exp(pair.log_ratio), math.exp(drift.log)
            error = math.hypot(pair.error, drift.error, scatter)
            changes.append(Change(suite, labels[setup], peer, pair.ours, *times, error))
    for peer, logs in by_peer.items():
        if len(logs) >= FEWEST_FOR_PEER:
            own = statistics.fmean(pairs[setup][peer].error for setup in logs)
            doubt = DRIFT_DOUBT * statistics.median(abs(drifts[setup].log) for setup in logs)
            of_median = MEDIAN_OVER_MEAN * math.hypot(scatter, own) / math.sqrt(len(logs))
            drift = statistics.median(drifts[setup].log for setup in logs)
            times = None, None, math.exp(medians[peer] + drift), math.exp(drift)
            label = f"median of {len(logs)} setups"
            changes.append(Change(suite, label, peer, True, *times, math.hypot(of_median, doubt)))
    return changes


def _drift(others: Sequence[Pair], overall: float) -> Drift:
    """The drift of one setup, from its peers that are not ours; without any, the overall drift."""
    if not others:
        return Drift(overall, DRIFT_DOUBT * abs(overall))
    logs = [pair.log_ratio for pair in others]
    log = statistics.median(logs)
    own = statistics.fmean(pair.error for pair in others)
    return Drift(log, math.hypot(max(statistics.pstdev(logs), own), DRIFT_DOUBT * log))


def _times(a: Row, b: Row) -> tuple[Time, Time]:
    """The times of one row before and after: both of the fastest sample, or both medians."""
    if a.get("samples_ms") and b.get("samples_ms"):
        return _fastest(a["samples_ms"]), _fastest(b["samples_ms"])
    return _median(a), _median(b)


def _fastest(samples: Sequence[float]) -> Time:
    ordered = sorted(samples)
    quarter = ordered[math.ceil((len(ordered) - 1) / 4)]
    return Time(ordered[0], ERROR_OF_QUARTER * (quarter / ordered[0] - 1))


def _median(row: Row) -> Time:
    sigma = SIGMA_OF_IQR * row["iqr_ms"] / row["ms"]
    return Time(row["ms"], MEDIAN_OVER_MEAN * sigma / math.sqrt(row["repeats"]))


def _scatter(ours: Sequence[float], others: Sequence[float]) -> float:
    """Standard deviation of log(ratio) between runs, beyond the errors of the samples."""
    known = [
        SIGMA_OF_MAD * statistics.median(abs(x - statistics.median(xs)) for x in xs)
        for xs in (ours, others)
        if len(xs) >= FEWEST_FOR_SCATTER
    ]
    return max(LEAST_SCATTER, min(known, default=0.0))


def _timed(row: Row | None) -> bool:
    return row is not None and row["status"] == "ok"


def _varying(*records: Record) -> set[str]:
    """The names in the key whose values differ between setups."""
    seen: dict[str, set] = {}
    for setup in chain(*(record.by_setup() for record in records)):
        for name, value in setup:
            seen.setdefault(name, set()).add(value)
    return {name for name, values in seen.items() if len(values) > 1}


def _label(setup: Setup, names: set[str]) -> str:
    values = [value for name, value in setup if name in names] or [setup[0][1] if setup else ""]
    return " ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in values)


def _warnings(before: Record, after: Record) -> Iterator[str]:
    for name in ("device", "threads"):
        a, b = before.env.get(name), after.env.get(name)
        if a != b:
            yield f"{before.path} was measured on other {name} than {after.path}: {a}, {b}"
    for record in (before, after):
        load, cores = record.env.get("load_average", 0), record.env.get("cpu_count", 0)
        if load > cores:
            yield f"{record.path} was measured on a busy machine: load {load} on {cores} cores"


def matched(before: Path, after: Path) -> tuple[list[tuple[Record, Record]], list[str]]:
    """Pairs of records to compare, and the files that have no counterpart.

    Raises:
        RecordError: not two files or two folders of results; says which and what is wrong.
    """
    for path in (before, after):
        if not path.exists():
            raise RecordError(f"{path}: No such file or folder")
    if before.is_dir() != after.is_dir():
        raise RecordError(f"{before} and {after}: one is a folder; give two files or two folders")
    if not before.is_dir():
        a, b = read_record(before), read_record(after)
        if a.suite != b.suite:
            raise RecordError(f"{before} holds {a.suite}, {after} holds {b.suite}: not comparable")
        return [(a, b)], []
    olds, news = ({r.path.relative_to(f): r for r in read_records(f)} for f in (before, after))
    names = [name for name in olds if name in news and olds[name].suite == news[name].suite]
    if not names:
        raise RecordError(f"{before} and {after}: no file of one suite has the same name in both")
    alone = [str(record.path) for name, record in {**olds, **news}.items() if name not in names]
    return [(olds[name], news[name]) for name in names], alone


def table(changes: Iterable[Change], tolerance: float) -> Table:
    """The changes as a table, the worst first."""
    out = Table()
    out.add_column("suite")
    out.add_column("setup", overflow="fold")
    out.add_column("peer", overflow="fold")
    for heading in ("before, ms", "after, ms", "B/A", "drift", "change", "noise"):
        out.add_column(heading, justify="right")
    out.add_column("")
    for c in sorted(changes, key=lambda c: -c.change):
        verdict = "slower" if c.slower(tolerance) else "faster" if c.faster(tolerance) else ""
        style = {"slower": "red", "faster": "green"}.get(verdict, "") if c.ours else "dim"
        times = ("" if t is None else f"{t:.4g}" for t in (c.before, c.after))
        ratios = (f"{x:.2f}" for x in (c.ratio, c.drift, c.change))
        row = c.suite, c.setup, c.peer, *times, *ratios, f"±{100 * (c.noise - 1):.0f} %"
        out.add_row(*row, verdict if c.ours else "", style=style)
    return out


def verdict(comparison: Comparison, tolerance: float) -> str:
    """One sentence; it begins with "Regression" if there is one."""
    ours = [c for c in comparison.changes if c.ours]
    slower = [c for c in ours if c.slower(tolerance)]
    faults = []
    if slower:
        worst = max(slower, key=lambda c: c.change)
        faults.append(
            f"{len(slower)} of {len(ours)} slower by more than {100 * tolerance:.0f} % and their"
            f" noise, the worst {worst.change:.2f} times ({worst.suite} {worst.setup} {worst.peer})"
        )
    if comparison.broken:
        faults.append(f"{len(comparison.broken)} no longer right")
    if faults:
        return f"Regression: of ours, {'; '.join(faults)}."
    if not ours:
        return "No regression, but no row of ours was timed in both."
    faster = sum(c.faster(tolerance) for c in ours)
    median = statistics.median(c.change for c in ours)
    gains = f", {faster} are faster" if faster else ""
    return f"No regression: of ours, none of {len(ours)} is slower{gains}; median {median:.2f}."


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    parser = ArgumentParser(prog="python -m bench compare", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("before", type=Path, help="result file, or folder of them")
    parser.add_argument("after", type=Path, help="likewise; files are matched by name")
    parser.add_argument(
        "--tolerance", type=float, default=0.1, help="how much slower is no regression; default 0.1"
    )
    try:
        given = parser.parse_args(arguments)
        if not given.tolerance >= 0:
            return fail(f"--tolerance is {given.tolerance}: it must not be negative", 2)
        pairs, alone = matched(given.before, given.after)
    except ArgumentError as error:
        return fail(explain(str(error), parser.get_defaults()), 2)
    except RecordError as error:
        return fail(error, 2)
    parts = [compare(a, b) for a, b in pairs]
    total = Comparison(*(list(chain(*lists)) for lists in zip(*parts, strict=True)))
    console().print(table(total.changes, given.tolerance))
    for title, lines in (("missing", [*total.missing, *alone]), ("broken", total.broken)):
        for line in lines:
            print(f"{title}: {line}")
    for line in dict.fromkeys(total.warnings):
        print(f"warning: {line}")
    words = verdict(total, given.tolerance)
    print(words)
    return 1 if words.startswith("Regression") else 0
