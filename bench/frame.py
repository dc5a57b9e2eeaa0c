"""The frame every benchmark stands in.

A suite yields setups (one case with its inputs) and names its peers once. For each setup every peer
is prepared, its results on every set of inputs it will be timed on are checked, and only what
was right is timed: after a warm-up, in interleaved repeats (one sample of each peer in turn, each
round starting at another peer), so that a slow spell of the machine hits all alike. What is being
done is said on stderr, between samples.

A row's `status`:
    ok       right, and timed
    wrong    some result differs from the reference; not timed; `reason` says where
    skipped  the peer does not do this here; `reason` says why
    failed   an exception; `reason` is its first line

Where a setup counts the work of a call (bench/roofline.py), its rows also say at what rates it went
and what share of the roofline that is; all say how many times faster they are than each other peer
that was timed: `ratios`. A peer that cannot be on this machine has no rows: `env.absent` says why.
"""

import fnmatch
import gc
import json
import math
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import torch
from jsonargparse import ArgumentError, ArgumentParser
from rich.console import Console
from rich.table import Table

from bench.environment import environment
from bench.meter import CpuMeter, CudaMeter, meter_for
from bench.roofline import Work, measure_roofline, rates
from threadweaver.progress import Status

Row = dict[str, Any]

MIN_REPEATS, MAX_REPEATS = 3, 50
SAMPLE_DIGITS = 4
# A call slower than this many budgets is timed once: its relative noise is small, its cost is not.
ONE_SHOT = 5

# Of every table: row key -> heading.
COLUMNS = {
    "ms": "ms",
    "iqr_ms": "± IQR",
    "repeats": "n",
    "peak_mb": "peak MB",
    "tflops": "TFLOP/s",
    "gb_per_s": "GB/s",
    "roofline": "roofline",
}

QUICK_HELP = "few small cases and few repeats, to see that everything works"
ONLY_HELP = (
    "run only rows that match, e.g. --only 'case=star*' 'peer=ours*'; keys as in the table's title,"
    " and peer; several globs of one key are alternatives"
)


class Skip(Exception):  # noqa: N818 - not an error
    """Raised by a peer that does not do this setup; the message is the reason."""


class UsageError(ValueError):
    """Options that cannot be met; the message names the option."""


class Setup(ABC):
    """One case with its inputs; what all peers of one comparison share.

    Attributes:
        input_sets: calls are numbered modulo this, so that inputs rotate.
    """

    input_sets = 1

    @property
    @abstractmethod
    def key(self) -> Row:
        """What identifies the comparison: case, dtype, pass, … Cheap: filters read it first."""

    @abstractmethod
    def check(self, peer: str, result: Any, inputs: int) -> str | None:
        """None if a peer's result on this set of inputs is right, else what is wrong with it."""

    def work(self, peer: str) -> Work:
        """What a call of this peer has to do."""
        return Work()

    def figures(self, peer: str, seconds: float) -> Row:
        """What else there is to say of a call that took so long."""
        return {}

    def close(self) -> None:  # noqa: B027 - nothing to do, as a rule
        """Ends what does not end with the object: threads."""


S = TypeVar("S", bound=Setup)


@dataclass(frozen=True)
class Peer(Generic[S]):
    """Something to time.

    Attributes:
        prepare: returns the call to time, given the number of the inputs; what it does itself is
            not timed. It raises Skip where the peer does not do the setup.
        why_absent: why the peer can do nothing at all on a device ("cpu" or "cuda") here, or None.
            It imports no more than it must.
    """

    name: str
    prepare: Callable[[S], Callable[[int], Any]]
    ours: bool = False
    why_absent: Callable[[str], str | None] = lambda device: None


@dataclass
class Options:
    """Options of every benchmark.

    Args:
        device: where to run.
        quick, only: see QUICK_HELP and ONLY_HELP.
        json: write {"env": ..., "rows": [...]} to this file; rewritten after every case.
        budget: seconds of timing per row. Default: 2, or 0.1 with --quick.
    """

    device: Literal["cpu", "cuda"] = "cpu"
    quick: bool = False
    json: Path | None = None
    only: list[str] = field(default_factory=list)
    budget: float | None = None


O = TypeVar("O", bound=Options)  # noqa: E741 - the options type beside S, the setup type


@dataclass(frozen=True)
class Suite(Generic[O, S]):
    """A benchmark: what it runs on, what it compares, and what its table shows.

    Attributes:
        setups: the setups for these options; large things in them are built when first used.
        columns: row key -> heading; a float is shown to three digits.
        versus: peer -> heading of a column that shows the ratio to it.
        relate: fills in what else follows from several rows of one setup, given those that are ok
            by their peers.
    """

    name: str
    options: type[O]
    setups: Callable[[O], Iterable[S]]
    peers: Sequence[Peer[S]]
    columns: dict[str, str] = field(default_factory=dict)
    versus: dict[str, str] = field(default_factory=dict)
    relate: Callable[[dict[str, Row]], None] = lambda rows: None


def measure(
    setup: S,
    peers: Sequence[Peer[S]],
    meter: CpuMeter | CudaMeter,
    budget: float,
    roofline: Row,
    show: Callable[[str, float | None], None] = lambda what, seconds: None,
) -> list[Row]:
    """One row for each peer, in order.

    Args:
        roofline: as measure_roofline returns it.
        show: hears what comes next, and how many seconds it will take, if that is known.
    """
    rows, timed = [], []
    for peer in peers:
        row: Row = {**setup.key, "peer": peer.name, "ours": peer.ours, "status": "ok"}
        row |= dict.fromkeys(("reason", "ms", "iqr_ms", "samples_ms", "repeats", "peak_bytes"))
        rows.append(row)
        try:
            show(f"preparing {peer.name}", None)
            call = peer.prepare(setup)
            for i in range(setup.input_sets):
                show(f"checking {peer.name}", None)
                if wrong := setup.check(peer.name, call(i), i):
                    row |= {"status": "wrong", "reason": f"{wrong} (inputs {i})"}
                    break
            else:
                timed.append(_Timing(row, call, setup.input_sets, meter))
        except UsageError:
            raise
        except Skip as reason:
            row |= {"status": "skipped", "reason": str(reason)}
        except Exception as error:
            line = (str(error).strip().splitlines() or [""])[0]
            row |= {"status": "failed", "reason": f"{type(error).__name__}: {line}"}
    gc.collect()
    gc.disable()  # as timeit does: a peer pays for its own objects, not for everybody's
    try:
        for timing in timed:
            show(f"measuring the memory of {timing.peer}", None)
            timing.measure_memory()
            show(f"warming up {timing.peer}", None)
            timing.warm_up(budget)
        rounds = max((timing.repeats for timing in timed), default=0)
        for round_ in range(rounds):
            shift = round_ % len(timed)
            for timing in timed[shift:] + timed[:shift]:
                if timing.is_due:
                    what = f"timing {timing.peer}, round {round_ + 1}/{rounds}"
                    show(what, timing.seconds_of_sample)
                    timing.sample()
    finally:
        gc.enable()
    for timing in timed:
        timing.finish()
        peer, seconds = timing.peer, timing.row["ms"] / 1e3
        timing.row |= rates(setup.work(peer), seconds, roofline) | setup.figures(peer, seconds)
    ok = {timing.peer: timing.row for timing in timed}
    for peer, row in ok.items():
        row["ratios"] = {p: other["ms"] / row["ms"] for p, other in ok.items() if p != peer}
    return rows


class _Timing:
    """The samples of one row.

    Attributes:
        repeats: how many samples it gets, known after the warm-up.
        seconds_of_sample: what a sample takes, as the warm-up went.
    """

    def __init__(
        self,
        row: Row,
        call: Callable[[int], Any],
        input_sets: int,
        meter: CpuMeter | CudaMeter,
    ):
        self.row, self._call, self._input_sets, self._meter = row, call, input_sets, meter
        self.repeats, self.seconds_of_sample = 1, 0.0
        self._count, self._calls = 0, 1
        self._samples: list[float] = []

    @property
    def peer(self) -> str:
        return self.row["peer"]

    @property
    def is_due(self) -> bool:
        """Whether it lacks samples."""
        return len(self._samples) < self.repeats

    def measure_memory(self) -> None:
        """By one call."""
        self.row["peak_bytes"] = self._meter.peak_bytes(self._next)

    def warm_up(self, budget: float) -> None:
        """One call for its time, from which the number of repeats follows."""
        seconds = self._seconds()
        if seconds > ONE_SHOT * budget:
            self._samples.append(seconds)
            return
        self._calls = self._meter.calls_in_sample(seconds)
        self.seconds_of_sample = self._calls * seconds
        fits = int(budget / self.seconds_of_sample)
        self.repeats = min(max(fits, MIN_REPEATS), MAX_REPEATS)

    def _next(self) -> Any:
        self._count += 1
        return self._call(self._count % self._input_sets)

    def _seconds(self) -> float:
        return self._meter.seconds(self._next, self._calls)

    def sample(self) -> None:
        self._samples.append(self._seconds())

    def finish(self) -> None:
        low, median, high = (1e3 * np.percentile(self._samples, (25, 50, 75))).tolist()
        samples = [float(f"{1e3 * seconds:.{SAMPLE_DIGITS}g}") for seconds in self._samples]
        self.row |= {"ms": median, "iqr_ms": high - low, "samples_ms": samples}
        self.row["repeats"] = len(samples)


class Only:
    """The --only filters: KEY=GLOB, alternatives within a key, all keys must hold."""

    def __init__(self, texts: Sequence[str]):
        self.globs: dict[str, list[str]] = {}
        for text in texts:
            key, equals, glob = text.partition("=")
            if not equals:
                raise UsageError(f"--only: {text!r} is not of the form KEY=GLOB")
            self.globs.setdefault(key, []).append(glob)

    def admits(self, row: Row) -> bool:
        """Looks at the keys that the row has."""
        return all(
            any(fnmatch.fnmatchcase(str(row[key]), glob) for glob in globs)
            for key, globs in self.globs.items()
            if key in row
        )


@dataclass(frozen=True)
class Selection(Generic[S]):
    """What of a suite is to run.

    Attributes:
        setups: taken out as they run, so that their inputs go.
        absent: why, of each peer that cannot be here.
    """

    setups: list[S]
    peers: list[Peer[S]]
    absent: dict[str, str]


def select(suite: Suite[O, S], options: O) -> Selection[S]:
    """Raises UsageError where the options cannot be met or leave nothing; says which option."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device here; use --device cpu")
    if options.json and not options.json.parent.is_dir():
        raise UsageError(f"--json: there is no folder {options.json.parent}")
    if options.budget is not None and options.budget <= 0:
        raise UsageError(f"--budget is {options.budget:g}: it must be more than 0")
    only = Only(options.only)
    setups = list(suite.setups(options))
    keys = {"peer", *setups[0].key}
    if unknown := sorted(set(only.globs) - keys):
        raise UsageError(
            f"--only: {suite.name} has no key {unknown[0]!r}; one of {', '.join(sorted(keys))}"
        )
    setups = [setup for setup in setups if only.admits(setup.key)]
    peers = [peer for peer in suite.peers if only.admits({"peer": peer.name})]
    if not setups or not peers:
        raise UsageError(f"--only {' '.join(options.only)}: nothing in {suite.name} matches")
    absent = {p.name: why for p in peers if (why := p.why_absent(options.device))}
    peers = [peer for peer in peers if peer.name not in absent]
    if not peers:
        whys = "; ".join(f"{name}: {why}" for name, why in absent.items())
        raise UsageError(f"--only {' '.join(options.only)}: no such peer is here: {whys}")
    return Selection(setups, peers, absent)


def run(suite: Suite[O, S], options: O, selection: Selection[S], console: Console) -> list[Row]:
    """Runs what was selected of a suite, shows it, and writes the result file if one is named."""
    budget = options.budget or (0.1 if options.quick else 2.0)
    meter = meter_for(options.device)
    roofline = measure_roofline(meter, options.quick)
    setups = selection.setups
    env = {
        "benchmark": suite.name,
        **environment(options.device),
        "quick": options.quick,
        "key": list(setups[0].key),
        "absent": selection.absent,
        "roofline": roofline,
    }
    _introduce(env, console)
    status = Status(Console(stderr=True))
    rows: list[Row] = []
    while setups:
        with closing(setups.pop(0)) as setup, status:
            show = show_on(status, suite, setup)
            new = measure(setup, selection.peers, meter, budget, roofline, show)
        suite.relate({row["peer"]: row for row in new if row["status"] == "ok"})
        rows += new
        console.print(_table(suite, setup.key, new))
        if options.json:
            write(options.json, env, rows)
    return rows


def show_on(status: Status, suite: Suite, setup: Setup) -> Callable[[str, float | None], None]:
    """Shows what comes next after the name of the suite and the case."""
    case = " ".join([suite.name, *(v for v in setup.key.values() if isinstance(v, str))])
    return lambda what, seconds: status.show(f"{case}: {what}", seconds)


def _introduce(env: Row, console: Console) -> None:
    roofline = env["roofline"]
    matmul = ", ".join(f"{x:.3g} in {dtype}" for dtype, x in roofline["matmul_tflops"].items())
    console.print(
        f"[bold]{env['benchmark']}[/] on {env['device']}, {env['threads']} threads."
        f" Roofline: copy {roofline['copy_gb_per_s']:.3g} GB/s, matrix product {matmul} TFLOP/s",
        highlight=False,
    )
    for peer, why in env["absent"].items():
        console.print(f"[dim]{peer}: absent, {why}[/]", highlight=False)


def write(path: Path, env: Row, rows: list[Row]) -> None:
    """Replaces a result file in one step, so that it is whole at any moment."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps({"env": env, "rows": rows}, indent=1) + "\n")
    partial.replace(path)


def _table(suite: Suite, key: Row, rows: list[Row]) -> Table:
    title = "  ".join(f"{name} {_show(value)}" for name, value in key.items())
    table = Table(title=title, title_justify="left", title_style="bold")
    cells = [_cells(suite, row) for row in rows]
    used = [heading for heading in _headings(suite) if any(heading in c for c in cells)]
    table.add_column("peer", overflow="fold")
    for heading in used:
        table.add_column(heading, justify="right")
    table.add_column("note", overflow="fold")
    for row, shown in zip(rows, cells, strict=True):
        note = "" if row["status"] == "ok" else f"{row['status']}: {row['reason']}"
        style = {"ok": "bold" if row["ours"] else "", "skipped": "dim"}.get(row["status"], "red")
        table.add_row(row["peer"], *(shown.get(h, "") for h in used), note, style=style)
    return table


def _headings(suite: Suite) -> list[str]:
    return [*COLUMNS.values(), *suite.columns.values(), *suite.versus.values()]


def _cells(suite: Suite, row: Row) -> dict[str, str]:
    """Heading -> what to show; what the row lacks is not there."""
    mb = None if row["peak_bytes"] is None else row["peak_bytes"] / 1e6
    ratios = map(row.get("ratios", {}).get, suite.versus)
    values = (*map({**row, "peak_mb": mb}.get, (*COLUMNS, *suite.columns)), *ratios)
    return {h: _show(v) for h, v in zip(_headings(suite), values, strict=True) if v is not None}


def _show(value: Any) -> str:
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 5)}f}"


def console() -> Console:
    """A log is not to fold its tables."""
    return Console(width=None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", 200)))


def exit_code(rows: list[Row]) -> int:
    """1 if any row is wrong or one of ours failed; each is named on stderr."""
    bad = [r for r in rows if r["status"] == "wrong" or (r["status"] == "failed" and r["ours"])]
    for row in bad:
        label = " ".join(str(v) for v in row.values() if isinstance(v, str))
        print(f"error: {label}", file=sys.stderr)
    return 1 if bad else 0


def main(suite: Suite[O, S], arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 1 if any row is wrong or one of ours failed."""
    parser = ArgumentParser(
        prog=f"python -m bench.{suite.name}", exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--quick", action="store_true", help=QUICK_HELP)
    parser.add_argument("--only", nargs="+", default=[], metavar="KEY=GLOB", help=ONLY_HELP)
    parser.add_class_arguments(suite.options, skip={"quick", "only"})
    try:
        options = suite.options(**vars(parser.parse_args(arguments)))
        rows = run(suite, options, select(suite, options), console())
    except (ArgumentError, UsageError) as error:
        print(f"bench.{suite.name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return exit_code(rows)
