"""`python -m bench list`: the suites, and each peer with the reason if it cannot run here."""

from __future__ import annotations

from argparse import ArgumentError
from typing import Any

from jsonargparse import ArgumentParser
from rich.table import Table

from bench.selection import check_device
from bench.suite import SUITES, Suite, UsageError, load_suite
from bench.table import console
from threadweaver.command import explain, fail


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    parser = ArgumentParser(prog="python -m bench list", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    try:
        device = parser.parse_args(arguments).device
        check_device(device)
    except ArgumentError as error:
        return fail(explain(str(error), parser.get_defaults()), 2)
    except UsageError as error:
        return fail(error, 2)
    table = Table()
    for heading in ("suite", "cases", "setups", "peer", f"on {device}"):
        table.add_column(heading, overflow="fold")
    for name in SUITES:
        suite = load_suite(name)
        cases, setups = _counts(suite, device)
        table.add_section()
        for i, peer in enumerate(suite.peers):
            why = peer.why_absent(device)
            of_suite = (name, cases, setups) if i == 0 else ("", "", "")
            style = "bold" if peer.ours else "dim" if why else ""
            table.add_row(*of_suite, peer.name, why or "here", style=style)
    console().print(table)
    return 0


def _counts(suite: Suite[Any, Any], device: str) -> tuple[str, str]:
    """The number of cases, and of setups they give (dtypes, passes, head dims)."""
    try:
        keys = [setup.key for setup in suite.setups(suite.options(device=device))]
    except UsageError:  # the suite does not run on this device
        return "0", "0"
    return str(len({key["case"] for key in keys})), str(len(keys))
