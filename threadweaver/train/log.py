"""What a run reports: one JSON line a step, the same to trackers, and progress on the terminal."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from threadweaver.progress import LINE_SECONDS, Bar, Pace, print_line
from threadweaver.train.trackers import Tracker


class MetricsLog:
    """metrics.jsonl, with one record for each step done, and the same to trackers.

    Args:
        run_dir: where it goes.
        steps_done: records of later steps are taken out first: the run, killed after its last
            checkpoint, takes these steps again.
    """

    def __init__(self, run_dir: Path, steps_done: int, trackers: Sequence[Tracker] = ()):
        path = run_dir / "metrics.jsonl"
        kept = []
        if path.exists():
            # The last line of a killed run may be cut short; it is then of a step to be redone.
            kept = path.read_text(encoding="utf-8").split("\n")[:steps_done]
        self.last: dict[str, Any] = json.loads(kept[-1]) if kept else {}
        partial = path.with_suffix(".partial")
        partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        partial.replace(path)
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._trackers = trackers

    def write(self, record: dict[str, Any]) -> None:
        """Adds the record of the next step; its `step` counts from 1."""
        self._file.write(json.dumps(record) + "\n")
        figures = {n: v for n, v in record.items() if n not in ("step", "epoch")}
        for tracker in self._trackers:
            tracker.log(figures, record["step"])
        self.last = record

    def sync(self) -> None:
        """Forces all records to disk; called before the checkpoint that relies on them."""
        self._file.flush()
        os.fsync(self._file.fileno())
        for tracker in self._trackers:
            tracker.flush()

    def close(self) -> None:
        self._file.close()
        for tracker in self._trackers:
            tracker.close()


class ProgressLog:
    """A live progress bar on a terminal; else a plain line every `log_every` steps, and after each
    step that ends some seconds after the last line."""

    def __init__(self, console: Console, steps_done: int, total_steps: int, log_every: int):
        self._console = console
        self._total = total_steps
        self._log_every = log_every
        self._lines = Pace(LINE_SECONDS)
        self._bar = Bar(console, "training", total_steps, "steps", done=steps_done, stays=True)

    def __enter__(self) -> ProgressLog:
        self._bar.__enter__()
        return self

    def __exit__(self, *exc) -> None:
        self._bar.__exit__()

    def update(self, record: dict[str, Any]) -> None:
        step, speed = record["step"], record["tokens_per_second"]
        shown = f"loss {record['loss']:.4f}, {speed:,.0f} tokens/s"
        if "reward" in record:
            shown = (
                f"reward {record['reward']:.3f}, accuracy {record['accuracy']:.1%}, longest path "
                f"{record['longest_path_tokens']:.0f}, {speed:,.0f} tokens/s"
            )
        validated = False
        if "validation_loss" in record:
            shown, validated = f"{shown}, validation {record['validation_loss']:.4f}", True
        if "validation_parallel_accuracy" in record:
            shares = [record[f"validation_{m}_accuracy"] for m in ("parallel", "sequential")]
            held_out = "{:.1%} in parallel and {:.1%} in sequential mode".format(*shares)
            shown, validated = f"{shown}, held out {held_out}", True
        self._bar.update(step, shown)
        wanted = step % self._log_every == 0 or step == self._total or validated
        if not self._console.is_interactive and self._lines.due(wanted):
            left = (self._total - step) * record["seconds"] / step
            line = f"step {step}/{self._total}: {shown}, {left:,.0f} s left"
            print_line(self._console, line)
