"""One run in its folder: prepared, worked off, finished.

On the CPU the result is a function of the settings, the data and the number of threads and of
ranks, bit for bit, however often the run was killed and resumed.

On several ranks (`threadweaver.ranks`) all of them go through all of it, at the same time: what one
does alone, rank 0 does, and the others are told what came of it.
"""

from __future__ import annotations

import shlex
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import torch
from rich.console import Console

from threadweaver import ranks
from threadweaver.data.files import data_files
from threadweaver.data.overlap import Text, find_overlap, texts_of_files
from threadweaver.device import give_back_memory
from threadweaver.lock import FolderLock, InUse, check_free
from threadweaver.progress import print_line
from threadweaver.train.config import ConfigError, RunConfig
from threadweaver.train.lora import check_lora
from threadweaver.train.offload import check_offload
from threadweaver.train.optimizer import check_optimizers
from threadweaver.train.run_dir import (
    check_run_dir,
    check_same_config,
    device_of,
    holds_run,
    settle_precision,
    write_config,
)
from threadweaver.train.same_on_ranks import check_folder, check_settings
from threadweaver.train.setup import prepare_torch
from threadweaver.train.trackers import check_trackers

C = TypeVar("C", bound=RunConfig)


@contextmanager
def _lock_errors(run_dir: Path) -> Iterator[None]:
    """Raises ConfigError for a run_dir that another process holds, or that cannot be written."""
    try:
        yield
    except InUse as error:
        raise ConfigError(f"run_dir: {error}") from error
    except OSError as error:
        raise ConfigError(
            f"run_dir: {error.filename or run_dir} cannot be written ({error.strerror}); name "
            "another folder"
        ) from error


class Run(ABC, Generic[C]):
    """A run that `prepare` makes ready.

    Attributes:
        device: where it computes.
        resume_command: what to run when it was stopped; of a stage, what continues the whole run.
        lock: of rank 0 on its folder, from `prepare` to the end of `run`.
        overlap: what summary.json says of report.overlap.
        state: of the newest checkpoint, for the kinds that have checkpoints; None: at the start.
    """

    resume_command: str
    device: torch.device
    lock: FolderLock | None = None
    state: dict[str, Any] | None = None

    def __init__(self, config: C, console: Console):
        self.config = config
        self.console = console
        self.run_dir = Path(config.run_dir)
        self.overlap: dict[str, Any] = {}
        self.started = time.perf_counter()
        path = shlex.quote(str(self.run_dir / "config.yaml"))
        self.resume_command = (
            f"{ranks.launcher()} threadweaver.train {config.command} --config {path} --resume"
        )

    @classmethod
    def prepare(
        cls,
        config: C,
        resume: bool | None,
        console: Console,
        check: Callable[[Self], None] = lambda run: None,
    ) -> Self | None:
        """A run ready to go, at its start or where it was stopped; None if it is finished.

        config.yaml, which makes the folder that of a run, is not written before all that the run
        needs at its start is known to be good.

        Args:
            resume: whether to continue what is in run_dir; None: if there is something.
            check: called with the run when all is loaded; may refuse it too.

        Raises:
            ValueError: settings or data that cannot be used.
        """
        run = cls(config, console)
        check_settings(config)
        if ranks.on_first(lambda: run._check_folder(resume)):
            summary = run.run_dir / "summary.json"
            print_line(console, f"{run.run_dir}: this run is finished, see {summary}")
            return None
        check_trackers(config.report.trackers)
        for path in config.report.overlap:
            try:
                data_files(path)
            except ValueError as error:
                raise ConfigError(f"report.overlap: {error}") from error
        ranks.on_first(run._lock_folder)
        try:
            check_folder(run.run_dir)
            check_lora(config.model)
            check_optimizers(config, device_of(config.compute))
            check_offload(config.compute, device_of(config.compute))
            precision_note, config.compute = ranks.on_first(
                lambda: (settle_precision(config, console), config.compute)
            )
            run.find_state()
            run.device = prepare_torch(config, run.state)
            give_back_memory()
            run.load()
            check(run)
            ranks.on_first(lambda: write_config(config, precision_note))
        except BaseException:
            if run.lock is not None:
                run.lock.release(undo=not holds_run(run.run_dir))
            raise
        return run

    def _check_folder(self, resume: bool | None) -> bool:
        """Whether the run is finished; ConfigError if it may not begin or go on."""
        with _lock_errors(self.run_dir):
            check_free(self.run_dir)
        check_run_dir(self.run_dir, holds_run(self.run_dir) if resume is None else resume)
        return self.is_finished()

    def _lock_folder(self) -> None:
        with _lock_errors(self.run_dir):
            self.lock = FolderLock(self.run_dir)

    def run(self) -> int:
        """To the end. Returns the exit code: 0, or 128 + the signal that stopped it."""
        try:
            return self.work()
        finally:
            if self.lock is not None:
                self.lock.release()

    def report_overlap(self, rows: Iterable[Text]) -> None:
        """Shows what training rows have in common with the files of report.overlap, and keeps it
        for summary.json."""
        if files := self.config.report.overlap:
            found = find_overlap(texts_of_files(files), rows)
            for line in found.lines():
                print_line(self.console, line)
            self.overlap = {"overlap": found.as_dict()}

    def is_finished(self) -> bool:
        return (self.run_dir / "summary.json").exists()

    def find_state(self) -> None:
        """Raises ConfigError if what is in run_dir was made with other settings."""
        ranks.on_first(lambda: check_same_config(self.config))

    @abstractmethod
    def load(self) -> None:
        """Loads what the run needs at its start, or where it was stopped."""

    @abstractmethod
    def work(self) -> int:
        """As `run`, with the folder locked."""
