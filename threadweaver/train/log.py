"""What a run reports: one JSON line a step, TensorBoard events, and progress on the terminal."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from torch.utils.tensorboard import SummaryWriter

from threadweaver.progress import LINE_SECONDS, Bar, Pace, print_line


class MetricsLog:
    """metrics.jsonl, with one record for each step done, and the same as TensorBoard events.

    Args:
        run_dir: where both go.
        steps_done: records of later steps are taken out first: the run, killed after its last
            checkpoint, takes these steps again.
    """

    def __init__(self, run_dir: Path, steps_done: int):
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
        self._board = SummaryWriter(str(run_dir), purge_step=steps_done + 1)

    def write(self, record: dict[str, Any]) -> None:
        """Adds the record of the next step; its `step` counts from 1."""
        self._file.write(json.dumps(record) + "\n")
        for name, value in record.items():
            if name not in ("step", "epoch"):
                self._board.add_scalar(name, value, record["step"])
        self.last = record

    def sync(self) -> None:
        """Forces all records to disk; called before the checkpoint that relies on them."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._board.flush()

    def close(self) -> None:
        self._file.close()
        self._board.close()


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
        if "validation_loss" in record:
            shown += f", validation {record['validation_loss']:.4f}"
        self._bar.update(step, shown)
        wanted = step % self._log_every == 0 or step == self._total or "validation_loss" in record
        if not self._console.is_interactive and self._lines.due(wanted):
            left = (self._total - step) * record["seconds"] / step
            line = f"step {step}/{self._total}: {shown}, {left:,.0f} s left"
            print_line(self._console, line)
