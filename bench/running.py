"""Running suites: `python -m bench run SUITE ...`, each into a result file of its own, and
`python -m bench.SUITE` for one with its own options.

What is being done is shown on stderr between samples, never during one.
"""

from __future__ import annotations

import sys
from argparse import ArgumentError
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from jsonargparse import ArgumentParser
from rich.console import Console

from bench.environment import environment, results_folder
from bench.measure import measure
from bench.meter import meter_for
from bench.record import write_json
from bench.roofline import measure_roofline
from bench.selection import Selection, select
from bench.suite import (
    ONLY_HELP,
    QUICK_HELP,
    SUITES,
    O,
    Options,
    Row,
    S,
    Setup,
    Suite,
    UsageError,
    load_suite,
)
from bench.table import console, setup_table
from threadweaver.command import explain, fail
from threadweaver.device import give_back_memory
from threadweaver.progress import Status

DEFAULT = "bench/results/<device>/<date>-<commit>"


def run(suite: Suite[O, S], options: O, selection: Selection[S]) -> list[Row]:
    """Runs what was selected of a suite, prints it, and writes the result file if one is named."""
    if not selection.setups:
        return []
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
    stdout, status = console(), Status(Console(stderr=True))
    _introduce(env, stdout)
    rows: list[Row] = []
    while setups:
        with closing(setups.pop(0)) as setup, status:
            give_back_memory()  # of the one before it
            show = show_on(status, suite, setup)
            new = measure(setup, selection.peers, meter, budget, roofline, show)
        suite.relate({row["peer"]: row for row in new if row["status"] == "ok"})
        rows += new
        stdout.print(setup_table(suite, setup.key, new))
        if options.json:
            write_json(options.json, {"env": env, "rows": rows})
    return rows


def show_on(status: Status, suite: Suite, setup: Setup) -> Callable[[str, float | None], None]:
    """The `show` of measure: what comes next, after the name of the suite and of the case."""
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


def exit_code(rows: list[Row]) -> int:
    """1 if any row is wrong or one of ours failed; each is named on stderr."""
    bad = [r for r in rows if r["status"] == "wrong" or (r["status"] == "failed" and r["ours"])]
    for row in bad:
        label = " ".join(str(v) for v in row.values() if isinstance(v, str))
        print(f"error: {label}", file=sys.stderr)
    return 1 if bad else 0


def suite_main(suite: Suite[O, S], arguments: list[str] | None = None) -> int:
    """The command line of `python -m bench.SUITE`; returns the exit code, as `main` does."""
    try:
        given = suite.parser(f"python -m bench.{suite.name}").parse_args(arguments)
        options = suite.options(**vars(given))
        rows = run(suite, options, select(suite, options))
    except (ArgumentError, UsageError) as error:
        print(f"bench.{suite.name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return exit_code(rows)


def main(arguments: list[str]) -> int:
    """Returns the exit code: 1 if any row is wrong or one of ours failed."""
    parser = ArgumentParser(prog="python -m bench run", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("suites", nargs="+", choices=list(SUITES), metavar="SUITE")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help=QUICK_HELP)
    parser.add_argument("--only", nargs="+", default=[], metavar="KEY=GLOB", help=ONLY_HELP)
    parser.add_argument("--budget", type=float, help="seconds of timing per row")
    parser.add_argument(
        "--json",
        nargs="?",
        const=DEFAULT,
        metavar="DIR",
        help=f"write DIR/<suite>.json; without DIR, to {DEFAULT}",
    )
    try:
        given = parser.parse_args(arguments)
        folder = None if given.json is None else Path(given.json)
        if folder and folder.suffix == ".json":
            raise UsageError(
                f"--json: {folder} is a file's name; run writes a file for each suite into a "
                f"folder, and python -m bench.{given.suites[0]} takes a file"
            )
        if given.json == DEFAULT:
            folder = results_folder(environment(given.device))
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        # All arguments are checked for all suites before the first one runs.
        chosen: list[tuple[Suite, Options, Selection]] = []
        for name in dict.fromkeys(given.suites):
            suite = load_suite(name)
            options = suite.options(
                device=given.device,
                quick=given.quick,
                only=given.only,
                budget=given.budget,
                json=folder and folder / f"{name}.json",
            )
            chosen.append((suite, options, select(suite, options)))
        rows = [row for choice in chosen for row in run(*choice)]
    except ArgumentError as error:
        return fail(explain(str(error), parser.get_defaults()), 2)
    except (UsageError, OSError) as error:
        return fail(error, 2)
    return exit_code(rows)
