"""Where the figures of a run go besides metrics.jsonl: TensorBoard, Weights & Biases, trackio.

They are for looking at a run, whose figures are all on disk: one that fails is given up with a
warning and never ends the run.
"""

from __future__ import annotations

import importlib
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from threadweaver.progress import print_line
from threadweaver.train.config import ConfigError, RunConfig, TrackerName
from threadweaver.whole_file import write_whole

MODULES: dict[TrackerName, str] = {
    "tensorboard": "torch.utils.tensorboard",
    "wandb": "wandb",
    "trackio": "trackio",
}
Figures = Mapping[str, float]


class Tracker(Protocol):
    """Takes the figures of steps, which count from 1."""

    def log(self, figures: Figures, step: int) -> None: ...

    def flush(self) -> None:
        """Called before the checkpoint of what was logged."""
        ...

    def close(self) -> None: ...


def check_trackers(names: Sequence[TrackerName]) -> None:
    """Raises ConfigError for one whose package is not there."""
    for name in names:
        try:
            importlib.import_module(MODULES[name])
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ConfigError(
                f"report.trackers: {name} cannot be used ({reason}): pip install {name}, or leave "
                "it out"
            ) from error


class TensorBoard:
    """Event files in the folder of the run."""

    def __init__(self, module: Any, run_dir: str, steps_done: int):
        self._writer = module.SummaryWriter(run_dir, purge_step=steps_done + 1)

    def log(self, figures: Figures, step: int) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Service:
    """A run of wandb, or of trackio, which has the same interface."""

    def __init__(self, run: Any):
        self._run = run

    def log(self, figures: Figures, step: int) -> None:
        self._run.log(dict(figures), step=step)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._run.finish()


class Guarded:
    """A tracker that is given up, with one warning, when something of it fails."""

    def __init__(self, name: TrackerName, start: Callable[[], Tracker], console: Console):
        self._name, self._console = name, console
        self._tracker: Tracker | None = None
        with self._guard():
            self._tracker = start()

    def log(self, figures: Figures, step: int) -> None:
        with self._guard():
            if self._tracker is not None:
                self._tracker.log(figures, step)

    def flush(self) -> None:
        with self._guard():
            if self._tracker is not None:
                self._tracker.flush()

    def close(self) -> None:
        with self._guard():
            if self._tracker is not None:
                self._tracker.close()

    @contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._tracker = None
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            print_line(
                self._console,
                f"warning: report.trackers: {self._name} failed ({reason}): it gets no more of "
                "this run, whose figures are all in metrics.jsonl",
            )


def start_trackers(config: RunConfig, steps_done: int, console: Console) -> list[Tracker]:
    """Those of report.trackers; steps from steps_done + 1 on are still to come.

    WANDB_PROJECT and TRACKIO_PROJECT name the project; it is else called threadweaver.
    """

    def start(name: TrackerName) -> Tracker:
        module = importlib.import_module(MODULES[name])
        if name == "tensorboard":
            return TensorBoard(module, config.run_dir, steps_done)
        project = os.environ.get(f"{name.upper()}_PROJECT", "threadweaver")
        own = _own_id(Path(config.run_dir))
        title = "-".join(Path(config.run_dir).parts[-2:])
        if name == "wandb":
            place = {"name": title, "id": own, "dir": config.run_dir}
        else:  # trackio knows a run by its name
            place = {"name": f"{title}-{own}"}
        return Service(module.init(project=project, config=asdict(config), resume="allow", **place))

    names = dict.fromkeys(config.report.trackers)
    return [Guarded(name, partial(start, name), console) for name in names]


def _own_id(run_dir: Path) -> str:
    """By which a service knows the run of this folder, also when it is resumed."""
    path = run_dir / "tracker-id"
    if not path.exists():
        write_whole(path, uuid.uuid4().hex[:12] + "\n")
    return path.read_text(encoding="utf-8").strip()
