"""The table of an evaluation, on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from threadweaver.evaluate.intervals import Estimate
from threadweaver.evaluate.metrics import Comparison, Evaluation
from threadweaver.generate.weaver import Mode


def print_table(
    console: Console,
    title: str,
    evaluations: dict[Mode, Evaluation],
    comparison: Comparison | None,
) -> None:
    """Prints a row for each metric and a column for each mode; below them the comparison."""
    table = Table(title=Text(title), title_justify="left")  # a path may look like markup
    table.add_column("")
    for mode in evaluations:
        table.add_column(mode, justify="right")
    metrics = {mode: evaluation.metrics() for mode, evaluation in evaluations.items()}
    samples = next(iter(evaluations.values())).samples
    labels = {"accuracy": f"accuracy (avg@{samples})"} if samples > 1 else {}
    names = dict.fromkeys(name for found in metrics.values() for name in found)
    for name in names:
        cells = (_cell(name, found.get(name)) for found in metrics.values())
        table.add_row(labels.get(name, name.replace("_", " ")), *cells)
    for name, cell in (
        ("max speedup", lambda e: f"{e.max_speedup:.2f}x" if e.max_speedup else ""),
        ("ended by a limit", lambda e: f"{sum(e.limits.values()):,}"),
        ("no answer", lambda e: f"{e.no_answer:,}"),
        ("not graded", lambda e: f"{e.ungraded:,}"),
        ("wall-clock", lambda e: f"{e.seconds:,.1f} s"),
        ("tokens per second", lambda e: f"{e.tokens_per_second:,.0f}"),
    ):
        table.add_row(name, *map(cell, evaluations.values()))
    console.print(table)
    if comparison:
        most = f", at most {comparison.max_speedup:.2f}x" if comparison.max_speedup else ""
        difference = comparison.accuracy_difference
        console.print(
            f"parallel over sequential: {_cell('speedup', comparison.speedup)} in token "
            f"latency{most}; {comparison.wall_clock_speedup:.2f}x in wall-clock; accuracy "
            f"{100 * difference.value:+.1f} points "
            f"[{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]",
            highlight=False,
        )


def _cell(name: str, estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    if name in _SHARES or name.startswith("pass@"):
        return f"{estimate.value:.1%} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"
    digits, unit = {"speedup": (2, "x"), "latency_seconds": (2, "")}.get(name, (1, ""))
    low, high = f"{estimate.low:,.{digits}f}", f"{estimate.high:,.{digits}f}"
    return f"{estimate.value:,.{digits}f}{unit} [{low}, {high}]"


_SHARES = ("accuracy", "format", "activation", "acceleration", "redundancy")
