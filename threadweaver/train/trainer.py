"""What every kind of training has in common: a model, an optimizer, steps, checkpoints.

A kind of training is a subclass that says what it trains on and what one step does. On the CPU the
result is a function of the settings, the data and the number of threads, bit for bit, however often
the run was killed and resumed.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import torch
from rich.console import Console
from torch import Tensor

from threadweaver.train.checkpoint import (
    all_checkpoints,
    check_shapes,
    load_state,
    save_checkpoint,
)
from threadweaver.train.config import ConfigError, TrainingConfig
from threadweaver.train.interrupt import Interrupts
from threadweaver.train.log import MetricsLog, ProgressLog
from threadweaver.train.run_dir import (
    check_run_dir,
    check_same_settings,
    resume_command,
    settings_of,
    settle_precision,
    write_config,
)
from threadweaver.train.setup import build_model, build_optimizer, prepare_torch
from threadweaver.trajectory import Codec

C = TypeVar("C", bound=TrainingConfig)
Record = dict[str, Any]


class Trainer(ABC, Generic[C]):
    """A model, its optimizer, and how far it has come.

    Args:
        checkpoint, state: where to continue and what `load_state` gave for it; None: at the start.

    Attributes:
        num_steps: steps of the whole run; set by `load`.
        fingerprint: of what it trains on; set by `load`.
        totals: sums over the steps done, by name; they live in checkpoints.

    Raises:
        ValueError: settings or data that cannot be used.
    """

    num_steps: int
    fingerprint: str

    def __init__(
        self, config: C, checkpoint: Path | None, state: dict[str, Any] | None, console: Console
    ):
        started = time.perf_counter()
        self.config = config
        self.console = console
        self.run_dir = Path(config.run_dir)
        self.device = prepare_torch(config, state)
        self.model, self.tokenizer = build_model(config, checkpoint)
        torch.nn.Module.to(self.model, self.device).train()
        self.codec = Codec.from_tokenizer(self.tokenizer)
        self.totals: dict[str, float] = {"seconds": 0.0}
        self.steps_done = 0
        self.load()
        if config.compute.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        if config.compute.compile:
            self.model.base_model.compile(dynamic=True)
        self.optimizer = build_optimizer(self.model, config)
        if checkpoint and state:
            self._restore(checkpoint, state)
        # So that now - origin is the wall-clock of the whole run, without the time it lay dead.
        self.origin = started - self.totals["seconds"]

    @classmethod
    def prepare(cls, config: C, resume: bool, console: Console) -> Self | None:
        """A trainer ready to run, at its start or where its newest checkpoint stands.

        None if the run is finished. Nothing is written to run_dir before all of it is known to be
        good.

        Raises:
            ValueError: settings or data that cannot be used.
        """
        run_dir = Path(config.run_dir)
        check_run_dir(run_dir, resume)
        if (run_dir / "summary.json").exists():
            summary = run_dir / "summary.json"
            console.print(f"{run_dir}: this run is finished, see {summary}", soft_wrap=True)
            return None
        precision_note = settle_precision(config, console)
        checkpoints = all_checkpoints(run_dir / "checkpoints")
        checkpoint = checkpoints[-1] if checkpoints else None
        state = load_state(checkpoint) if checkpoint else None
        if checkpoint and state:
            check_same_settings(config, state["settings"], checkpoint)
            console.print(f"resuming from {checkpoint}", soft_wrap=True)
        trainer = cls(config, checkpoint, state, console)
        write_config(config, precision_note)
        return trainer

    @abstractmethod
    def load(self) -> None:
        """Loads what the run trains on, with the model there and the optimizer not yet."""

    @abstractmethod
    def train_step(self) -> Record:
        """Takes step number self.steps_done, counted from 0; what it reports. `loss` and
        `tokens_per_second` are shown."""

    @abstractmethod
    def finish(self) -> None:
        """Writes summary.json, which makes the run finished, and shows what came out."""

    def run(self) -> int:
        """Trains to the end. Returns the exit code: 0, or 128 + the signal that stopped it.

        Raises:
            NotFiniteError: a step's loss or gradient norm.
        """
        stopped_by = self.fit()
        if stopped_by is not None:
            command = resume_command(self.config)
            self.console.print(f"stopped and saved; continue with: {command}", soft_wrap=True)
            return 128 + stopped_by
        self.finish()
        return 0

    def fit(self) -> int | None:
        """Takes the steps that are left. Returns the signal that stopped it early, if one did."""
        report = self.config.report
        with ExitStack() as stack:
            interrupts = stack.enter_context(Interrupts())
            self.metrics = MetricsLog(self.run_dir, self.steps_done)
            stack.callback(self.metrics.close)
            progress = stack.enter_context(
                ProgressLog(self.console, self.steps_done, self.num_steps, report.log_every)
            )
            while self.steps_done < self.num_steps:
                record = {"step": self.steps_done + 1, **self.train_step()}
                record["seconds"] = time.perf_counter() - self.origin
                self.steps_done += 1
                self.metrics.write(record)
                progress.update(record)
                stop = interrupts.received
                last = self.steps_done == self.num_steps
                if last or stop is not None or self.steps_done % report.checkpoint_every == 0:
                    self._save()
                if stop is not None:
                    return stop
        return None

    @property
    def last_checkpoint(self) -> Path:
        return all_checkpoints(self.run_dir / "checkpoints")[-1]

    def autocast(self) -> torch.autocast:
        """In which the model computes, if compute.precision is bf16."""
        enabled = self.config.compute.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def clip_gradient(self) -> Tensor:
        """Its norm before it was clipped."""
        largest = self.config.optimization.gradient_clip
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), largest)

    def update(self, learning_rate: float) -> None:
        """Moves the weights along the gradient, and clears it."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()

    def add_to_totals(self, **amounts: float) -> None:
        for name, amount in amounts.items():
            self.totals[name] = self.totals.get(name, 0) + amount

    def _save(self) -> None:
        # The checkpoint promises that the records of its steps are there.
        self.metrics.sync()
        self.totals["seconds"] = time.perf_counter() - self.origin
        state = {
            "step": self.steps_done,
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
            "totals": self.totals,
            "settings": settings_of(self.config),
            "data": self.fingerprint,
            "threads": torch.get_num_threads(),
        }
        save_checkpoint(
            self.run_dir / "checkpoints",
            self.steps_done,
            self.model,
            self.tokenizer,
            state,
            self.config.report.keep_checkpoints,
        )

    def _restore(self, checkpoint: Path, state: dict[str, Any]) -> None:
        check_shapes(checkpoint, state, self.model)
        if state["data"] != self.fingerprint:
            raise ConfigError(
                f"{self.config.trains_on} is not what {checkpoint} was trained on; resume with the "
                "same data or start another run"
            )
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and state["cuda_rng"]:
            torch.cuda.set_rng_state_all(state["cuda_rng"])
        self.steps_done = state["step"]
        self.totals = state["totals"]
