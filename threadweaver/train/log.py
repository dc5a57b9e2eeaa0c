"""What a run reports: one JSON line a step, the same to trackers, and progress on the terminal."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from threadweaver.progress import LINE_SECONDS, Bar, Pace, print_line
from threadweaver.train.config import ConfigError
from threadweaver.train.trackers import Tracker
from threadweaver.whole_file import write_whole


class LastRecord:
    """The record of the last step, written nowhere: on ranks that are not the first.

    Attributes:
        last: it; empty before the first step.
    """

    def __init__(self, last: dict[str, Any]):
        self.last = last

    def write(self, record: dict[str, Any]) -> None:
        """Takes the record of the next step; its `step` counts from 1."""
        self.last = record

    def sync(self) -> None:
        """Forces all records to disk; called before the checkpoint that relies on them."""

    def close(self) -> None:
        """At the end of the run."""


class MetricsLog(LastRecord):
    """metrics.jsonl, with one record for each step done, and the same to trackers.

    Args:
        run_dir: where it goes.
        steps_done: records of later steps are taken out first: the run, killed after its last
            checkpoint, takes these steps again.
        last: the record of step number `steps_done`, should the file lack it.

    Raises:
        ConfigError: what is there is damaged.
    """

    def __init__(
        self,
        run_dir: Path,
        steps_done: int,
        trackers: Sequence[Tracker] = (),
        last: dict[str, Any] | None = None,
    ):
        path = run_dir / "metrics.jsonl"
        records = read_metrics(path, steps_done) if path.exists() else []
        super().__init__(records[-1] if records else last or {})
        write_whole(path, (f"{json.dumps(record)}\n" for record in records))
        self._path = path
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._trackers = trackers

    def write(self, record: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        figures = {n: v for n, v in record.items() if n not in ("step", "epoch")}
        for tracker in self._trackers:
            tracker.log(figures, record["step"])
        super().write(record)

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        for tracker in self._trackers:
            tracker.flush()

    def close(self) -> None:
        with suppress(OSError):  # on a full disk, which was said before
            self._file.close()
        for tracker in self._trackers:
            tracker.close()


def read_metrics(path: Path, steps: int | None = None) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, in order.

    Args:
        steps: only those up to this one.

    Raises:
        ConfigError: it is damaged; names the line and says what to do.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}: delete it and resume the run") from error
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            step = int(record["step"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if number == len(lines):  # cut short by a kill; it is then of a step to be redone
                break
            raise ConfigError(
                f"{path}:{number}: no record of a step: delete the file and resume the run, which "
                "goes on without the records before"
            ) from error
        if steps is None or step <= steps:
            records.append(record)
    return records


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
