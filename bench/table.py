"""The table of one setup on the terminal: a line for each peer, columns that some row fills."""

from __future__ import annotations

import math
import os
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.suite import Row, Suite

# Columns of every suite: row key -> heading.
COLUMNS = {
    "ms": "ms",
    "iqr_ms": "± IQR",
    "repeats": "n",
    "peak_mb": "peak MB",
    "tflops": "TFLOP/s",
    "gb_per_s": "GB/s",
    "roofline": "roofline",
}


def console() -> Console:
    """Standard output; 200 columns wide where it is no terminal and COLUMNS is not set."""
    return Console(width=None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", 200)))


def setup_table(suite: Suite, key: Row, rows: list[Row]) -> Table:
    """The rows of one setup; the title is its key."""
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
    """Heading -> text, of the columns that the row has a value for."""
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
