"""The table and the plot that the command ends with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table
from rich.text import Text

from threadweaver.annotate.summary import ASKING
from threadweaver.progress import print_line

MOST_REASONS = 6
MOST_CHARACTERS = 300  # of what is said of the first for a reason


def print_summary(console: Console, summary: Mapping[str, Any], folder: Path) -> None:
    total = summary["problems"]
    table = Table(title=f"{total:,} problems", title_justify="left")
    table.add_column("step", no_wrap=True)
    for name in ("passed", "yield", "requests", "sent back", "prompt tokens", "completion tokens"):
        table.add_column(name, justify="right")
    for step, figures in summary["steps"].items():
        asked = ("", "", "", "")
        if step in ASKING:
            sent_back = sum(figures["breaches"].values())
            values = (figures["requests"], sent_back)
            tokens = (figures["prompt_tokens"], figures["completion_tokens"])
            asked = tuple(f"{value:,}" for value in (*values, *tokens))
        share = figures["passed"] / total if total else 0.0
        table.add_row(step, f"{figures['passed']:,}", f"{share:.1%}", *asked)
    console.print(table)
    for reason, count in list(summary["rejected"].items())[:MOST_REASONS]:
        detail = " ".join(summary["details"].get(reason, "").split())[:MOST_CHARACTERS]
        more = f", the first: {detail}" if detail else ""
        print_line(console, f"left out: {count:,}, {reason}{more}")
    if summary["kept"]:
        print_line(
            console,
            f"acceleration: {summary['acceleration']:.1%} mean, "
            f"{summary['acceleration_median']:.1%} median; "
            f"{summary['threads_per_block']:.1f} threads a block",
        )
    breaches: dict[str, int] = {}
    for step in ASKING:
        for kind, count in summary["steps"][step]["breaches"].items():
            breaches[kind] = breaches.get(kind, 0) + count
    retries = sum(summary["steps"][step]["retries"] for step in ASKING)
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(breaches.items())) or "none"
    print_line(
        console,
        f"replies sent back: {kinds}; requests repeated: {retries:,}; threads left as they were: "
        f"{summary['threads_unchanged']:,}; blocks dissolved: {summary['blocks_dissolved']:,}",
    )
    print_line(
        console,
        f"teacher: {summary['prompt_tokens']:,} prompt and {summary['completion_tokens']:,} "
        f"completion tokens, {summary['cost']:,.2f} at the prices given",
    )
    console.print(Text(f"{folder / 'kept.jsonl'}: {summary['kept']:,} rows", no_wrap=True))


def plot_summary(summary: Mapping[str, Any], accelerations: Sequence[float], path: Path) -> None:
    """Trajectories left after each step, the acceleration of those kept, tokens of the teacher."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    left, middle, right = axes
    steps = summary["steps"]
    bars = left.bar(list(steps), [figures["passed"] for figures in steps.values()])
    left.bar_label(bars)
    left.set_ylabel("trajectories left")
    left.tick_params(axis="x", rotation=30)
    middle.hist([100 * a for a in accelerations], bins=20)
    middle.set_xlabel("acceleration, %")
    middle.set_ylabel("trajectories kept")
    bottom = [0] * len(ASKING)
    for name in ("prompt_tokens", "completion_tokens"):
        counts = [steps[step][name] for step in ASKING]
        right.bar(ASKING, counts, bottom=bottom, label=name.replace("_", " "))
        bottom = [b + c for b, c in zip(bottom, counts, strict=True)]
    right.set_ylabel("tokens of the teacher")
    right.legend(frameon=False, fontsize="small")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
