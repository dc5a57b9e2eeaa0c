"""The table that a finished run ends with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def print_table(console: Console, summary: dict[str, Any], run_dir: Path) -> None:
    """Shows a summary (the keys of summary.json); what was not measured is left out."""
    rows = [
        ("train loss", _number(summary["train_loss"], "{:.4f}")),
        ("validation loss", _number(summary["validation_loss"], "{:.4f}")),
        ("accuracy", _number(summary["accuracy"], "{:.1%}")),
        ("format correct", _number(summary["format_correct"], "{:.1%}")),
        ("steps", f"{summary['steps']:,}"),
        ("tokens per second", f"{summary['tokens_per_second']:,.0f}"),
        ("unrolled / trie tokens", f"{summary['unrolled_per_trie_token']:.2f}"),
        ("wall-clock", f"{summary['seconds']:,.0f} s"),
        ("checkpoint", summary["checkpoint"]),
        ("curves", f"tensorboard --logdir {run_dir}"),
        (
            "train it further",
            f"python -m threadweaver.train sft --model.path {summary['checkpoint']} "
            "--data.train FILE --run_dir FOLDER",
        ),
    ]
    table = Table(title="Supervised fine-tuning", show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        if value is not None:
            table.add_row(name, value)
    console.print(table)


def _number(value: float | None, form: str) -> str | None:
    return None if value is None else form.format(value)
