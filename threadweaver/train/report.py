"""The table that a finished run ends with."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from threadweaver.progress import print_line
from threadweaver.ranks import launcher


def print_sft_table(console: Console, summary: dict[str, Any], run_dir: Path) -> None:
    """Shows a summary (the keys of summary.json); what was not measured is left out."""
    rows = [
        ("train loss", _number(summary["train_loss"], "{:.4f}")),
        ("validation loss", _number(summary["validation_loss"], "{:.4f}")),
        ("accuracy", _number(summary.get("accuracy"), "{:.1%}")),
        ("format", _number(summary.get("format"), "{:.1%}")),
        ("accuracy in threads", _number(summary.get("parallel_accuracy"), "{:.1%}")),
        ("format in threads", _number(summary.get("parallel_format"), "{:.1%}")),
        ("answers with threads", _number(summary.get("parallel_activation"), "{:.1%}")),
        ("speed-up by threads, tokens", _number(summary.get("speedup"), "{:.2f}")),
        ("speed-up by threads, time", _number(summary.get("wall_clock_speedup"), "{:.2f}")),
        ("steps", f"{summary['steps']:,}"),
        ("tokens per second", f"{summary['tokens_per_second']:,.0f}"),
        ("unrolled / trie tokens", f"{summary['unrolled_per_trie_token']:.2f}"),
        ("computed / trie tokens", _number(summary.get("computed_per_trie_token"), "{:.2f}")),
        ("wall-clock", f"{summary['seconds']:,.0f} s"),
        ("checkpoint", summary["checkpoint"]),
        ("curves", f"tensorboard --logdir {shlex.quote(str(run_dir))}"),
        (
            "train it further",
            f"{launcher()} threadweaver.train sft --model.path "
            f"{shlex.quote(summary['checkpoint'])} --data.train FILE --run_dir FOLDER",
        ),
    ]
    _print(console, "Supervised fine-tuning", rows)


def print_rl_table(console: Console, summary: dict[str, Any], run_dir: Path) -> None:
    """Shows the summary of a P-GRPO run; means are those of the last batch."""

    def held_out(mode: str) -> float | None:
        return summary.get(f"validation_{mode}_accuracy")

    rows = [
        ("reward", f"{summary['reward']:.3f}"),
        ("accuracy", f"{summary['accuracy']:.1%}"),
        ("format correct", f"{summary['format']:.1%}"),
        ("activation", f"{summary['activation']:.1%}"),
        ("longest path", f"{summary['longest_path_tokens']:,.0f} tokens"),
        ("all tokens", f"{summary['total_tokens']:,.0f}"),
        ("steps", f"{summary['steps']:,}"),
        ("groups without signal", f"{summary['no_signal_groups']:,} of {summary['groups']:,}"),
        (
            "prompts skipped",
            f"{summary['skipped_prompts']:,}" if summary["skipped_prompts"] else None,
        ),
        ("held out, parallel", _number(held_out("parallel"), "{:.1%}")),
        ("held out, sequential", _number(held_out("sequential"), "{:.1%}")),
        ("rollout", f"{summary['rollout_tokens_per_second']:,.0f} tokens/s"),
        ("update", f"{summary['update_tokens_per_second']:,.0f} trie tokens/s"),
        ("unrolled / trie tokens", f"{summary['unrolled_per_trie_token']:.2f}"),
        ("computed / trie tokens", _number(summary.get("computed_per_trie_token"), "{:.2f}")),
        ("wall-clock", f"{summary['seconds']:,.0f} s"),
        ("checkpoint", summary["checkpoint"]),
        ("curves", f"tensorboard --logdir {shlex.quote(str(run_dir))}"),
    ]
    _print(console, "P-GRPO, last batch", rows)


def print_self_train_table(console: Console, summary: dict[str, Any]) -> None:
    """Shows the summary of a run of self-training."""
    before, after = summary["before"], summary["after"]
    rejected = ", ".join(f"{n:,} {reason}" for reason, n in summary["rejected"].items() if n)
    rows = [
        ("rollouts", f"{summary['rollouts']:,}"),
        ("kept", f"{summary['kept']:,} ({summary['acceptance']:.1%})"),
        ("rejected", rejected or "none"),
        *(
            (name, f"{before[key]:.1%} before, {after[key]:.1%} after")
            for name, key in (
                ("format correct", "format"),
                ("accuracy", "accuracy"),
                ("activation", "activation"),
            )
        ),
        ("checkpoint", summary["checkpoint"]),
    ]
    _print(console, "Self-training, training problems", rows)


def print_pipeline_table(console: Console, summary: dict[str, Any], run_dir: Path) -> None:
    """Shows the held-out problems after each stage, in both modes."""
    table = Table(title="Held-out problems", title_justify="left")
    table.add_column("stage")
    table.add_column("mode")
    for name in ("accuracy", "format", "activation", "all tokens", "longest path", "total/longest"):
        table.add_column(name, justify="right")
    for stage, modes in summary["stages"].items():
        for mode, e in modes.items():
            table.add_row(
                stage.replace("_", "-"),
                mode,
                *(f"{e[key]:.1%}" for key in ("accuracy", "format", "activation")),
                *(f"{e[key]:,.1f}" for key in ("total_tokens", "longest_path_tokens")),
                f"{e['total_tokens'] / e['longest_path_tokens']:.2f}",
            )
    console.print(table)
    print_line(
        console,
        f"token-latency speed-up of parallel over sequential mode: {summary['speedup']:.2f}\n"
        f"final model: {summary['checkpoint']}\n"
        f"plots: {run_dir / 'stages.png'}, {run_dir / 'rl.png'}",
    )


def _print(console: Console, title: str, rows: Sequence[tuple[str, str | None]]) -> None:
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        if value is not None:
            table.add_row(name, Text(value))  # a path may hold what looks like markup
    console.print(table)


def _number(value: float | None, form: str) -> str | None:
    return None if value is None else form.format(value)
