"""`python -m bench run SUITE ...`: suites one after another, each into a result file of its own."""

from __future__ import annotations

from argparse import ArgumentError
from pathlib import Path

from jsonargparse import ArgumentParser

from bench.environment import environment, results_folder
from bench.frame import (
    ONLY_HELP,
    QUICK_HELP,
    Options,
    Selection,
    Suite,
    UsageError,
    console,
    exit_code,
    run,
    select,
)
from bench.suites import SUITES, load_suite
from threadweaver.command import explain, fail

DEFAULT = "bench/results/<device>/<date>-<commit>"


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
        # All that can be wrong with the arguments shows before the first suite takes its time.
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
        shown = console()
        rows = [row for choice in chosen for row in run(*choice, shown)]
    except ArgumentError as error:
        return fail(explain(str(error), parser.get_defaults()), 2)
    except (UsageError, OSError) as error:
        return fail(error, 2)
    return exit_code(rows)
