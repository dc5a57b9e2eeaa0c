"""One run in its folder: prepared, taken step by step, saved, stopped and resumed.

`Run` is what all kinds have in common, `Trainer` what those that take optimizer steps have. On the
CPU the result is a function of the settings, the data and the number of threads, bit for bit,
however often the run was killed and resumed.
"""

from __future__ import annotations

import shlex
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import torch
from rich.console import Console
from torch import Tensor

from threadweaver.data.files import data_files
from threadweaver.data.overlap import Text, find_overlap, texts_of_files
from threadweaver.lock import FolderLock, InUse, check_free
from threadweaver.model import (
    WeightCopies,
    end_ids,
    parameter_count,
    save_model,
    to_device,
    weights_fingerprint,
)
from threadweaver.progress import Progress, has_no_reader, print_line
from threadweaver.train.checkpoint import (
    all_checkpoints,
    check_room,
    check_shapes,
    damaged_state,
    load_state,
    plain_folder,
    save_checkpoint,
)
from threadweaver.train.config import ConfigError, RunConfig
from threadweaver.train.interrupt import Interrupts
from threadweaver.train.log import MetricsLog, ProgressLog
from threadweaver.train.lora import RunAdapters, check_lora
from threadweaver.train.memory.choice import choose_pass_tokens
from threadweaver.train.not_finite import save_batch
from threadweaver.train.offload import ActivationOffload, check_offload
from threadweaver.train.optimizer import (
    build_optimizer,
    check_optimizers,
    clip_gradient,
    set_learning_rate,
)
from threadweaver.train.run_dir import (
    check_run_dir,
    check_same_config,
    check_same_settings,
    device_of,
    holds_run,
    settings_of,
    settle_precision,
    write_config,
)
from threadweaver.train.setup import (
    build_model,
    compile_layers,
    prepare_torch,
    recompute_activations,
)
from threadweaver.train.stages import RLConfig, SFTConfig
from threadweaver.train.trackers import check_trackers, start_trackers
from threadweaver.trajectory import Codec
from tw_kernels import Trie

STATE_KEYS = (
    "step",
    "optimizer",
    "rng",
    "cuda_rng",
    "totals",
    "settings",
    "data",
    "threads",
    "shapes",
)
C = TypeVar("C", bound=RunConfig)
T = TypeVar("T", bound=SFTConfig | RLConfig)
Record = dict[str, Any]


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
        lock: on its folder, from `prepare` to the end of `run`.
        overlap: what summary.json says of report.overlap.
        state: of the newest checkpoint, for the kinds that have checkpoints; None: at the start.
    """

    resume_command: str
    device: torch.device
    lock: FolderLock
    state: dict[str, Any] | None = None

    def __init__(self, config: C, console: Console):
        self.config = config
        self.console = console
        self.run_dir = Path(config.run_dir)
        self.overlap: dict[str, Any] = {}
        self.started = time.perf_counter()
        path = shlex.quote(str(self.run_dir / "config.yaml"))
        self.resume_command = (
            f"python -m threadweaver.train {config.command} --config {path} --resume"
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
        with _lock_errors(run.run_dir):
            check_free(run.run_dir)
        check_run_dir(run.run_dir, holds_run(run.run_dir) if resume is None else resume)
        if run.is_finished():
            summary = run.run_dir / "summary.json"
            print_line(console, f"{run.run_dir}: this run is finished, see {summary}")
            return None
        check_trackers(config.report.trackers)
        for path in config.report.overlap:
            try:
                data_files(path)
            except ValueError as error:
                raise ConfigError(f"report.overlap: {error}") from error
        with _lock_errors(run.run_dir):
            run.lock = FolderLock(run.run_dir)
        try:
            check_lora(config.model)
            check_optimizers(config, device_of(config.compute))
            check_offload(config.compute, device_of(config.compute))
            precision_note = settle_precision(config, console)
            run.find_state()
            run.device = prepare_torch(config, run.state)
            run.load()
            check(run)
            write_config(config, precision_note)
        except BaseException:
            run.lock.release(undo=not holds_run(run.run_dir))
            raise
        return run

    def run(self) -> int:
        """To the end. Returns the exit code: 0, or 128 + the signal that stopped it."""
        try:
            return self.work()
        finally:
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
        check_same_config(self.config)

    @abstractmethod
    def load(self) -> None:
        """Loads what the run needs at its start, or where it was stopped."""

    @abstractmethod
    def work(self) -> int:
        """As `run`, with the folder locked."""


class Trainer(Run[T]):
    """A model, its optimizer, and how far it has come.

    A kind of training is a subclass that says what it trains on and what one step does.

    Attributes:
        num_steps: steps of the whole run; set by `load_data`.
        trains_on: the setting that names the data, and its value; set by `load_data`.
        fingerprint: of the data; set by `load_data`.
        last_record: of the last step that a checkpoint knows of.
        totals: sums over the steps done, by name; they live in checkpoints.
        lora: the adapters that are trained in place of the weights; None: the weights are.
        offload: of its activations, if compute.activation_offload is set.
        pass_tokens: most tokens of a pass: compute.pass_tokens or, without it, what a GPU has
            memory for; None: no limit.
        copies: of its matrices in the dtype of their products; cast before the passes of a step.
    """

    num_steps: int
    trains_on: str
    fingerprint: str
    offload: ActivationOffload | None = None
    pass_tokens: int | None = None

    @abstractmethod
    def load_data(self) -> None:
        """Loads what the run trains on, with the model there and the optimizer not yet."""

    @abstractmethod
    def train_step(self) -> Record:
        """Takes step number self.steps_done, counted from 0; what it reports. `loss` and
        `tokens_per_second` are shown."""

    @abstractmethod
    def finish(self) -> None:
        """Writes summary.json, which makes the run finished, and shows what came out."""

    def find_state(self) -> None:
        if checkpoints := all_checkpoints(self.run_dir / "checkpoints"):
            checkpoint = checkpoints[-1]
            self.state = load_state(checkpoint, *STATE_KEYS)
            check_same_settings(self.config, self.state["settings"], checkpoint)
            print_line(self.console, f"resuming from {checkpoint}")

    def load(self) -> None:
        compute, has_lora = self.config.compute, self.config.model.lora is not None
        checkpoint = self.last_checkpoint if self.state and not has_lora else None
        self.model, self.tokenizer = build_model(self.config, checkpoint)
        print_line(self.console, f"model: {parameter_count(self.model)}")
        to_device(self.model, self.device)
        self.lora = self._add_adapters() if has_lora else None
        self.model.train()
        self.codec = Codec.from_tokenizer(self.tokenizer, end_ids(self.model), self.config.template)
        self.totals: dict[str, float] = {"seconds": 0.0}
        self.last_record: Record = {}
        self.steps_done = 0
        self.pass_tokens = self._settle_passes()
        self.load_data()
        if compute.compile:
            compile_layers(self.model)
        if compute.activation_offload:
            self.offload = ActivationOffload(self.model)
        if compute.gradient_checkpointing:
            recompute_activations(self.model, compute.gradient_checkpointing, self.offload)
        # On a CPU autocast casts as it always did: results stay the same, bit for bit.
        by_copies = self.device.type == "cuda" and compute.precision == "bf16"
        self.copies = WeightCopies(self.model, torch.bfloat16 if by_copies else None)
        self.optimizer = build_optimizer(self.model, self.config.optimization)
        if self.state:
            self._restore(self.last_checkpoint, self.state)
            self.state = None  # the moments take twice the memory of the weights
        self._check_room()
        # So that now - origin is the wall-clock of the whole run, less the time between stop and
        # resume.
        self.origin = self.started - self.totals["seconds"]

    def _settle_passes(self) -> int | None:
        """compute.pass_tokens, or what a GPU has memory for, which is shown."""
        compute = self.config.compute
        if compute.pass_tokens is not None or self.device.type != "cuda":
            return compute.pass_tokens
        with Progress(self.console, "counting the memory of an update", None, "counts"):
            choice = choose_pass_tokens(self.config)
        if choice.note:
            print_line(self.console, choice.note)
        return choice.tokens

    def _add_adapters(self) -> RunAdapters:
        """Those of the checkpoint that the run continues from, or new ones."""
        base = weights_fingerprint(self.model)
        if self.state and self.state.get("base", base) != base:
            raise ConfigError(
                f"model.path: {self.config.model.path} is not what the adapters of "
                f"{self.last_checkpoint} were trained for; resume with the same model or start "
                "another run"
            )
        self._base_fingerprint = base
        adapters = RunAdapters(self.config, self.model, self.tokenizer)
        if self.state:
            adapters.load(self.last_checkpoint)
        trained = sum(p.numel() for p in adapters.adapters.parameters())
        print_line(self.console, f"adapters: {trained:,} parameters are trained")
        return adapters

    def work(self) -> int:
        """See `Run`.

        Raises:
            NotFiniteError: a step's loss or gradient norm.
        """
        stopped_by = self._take_steps()
        if stopped_by is not None:
            print_line(self.console, f"stopped and saved; continue with: {self.resume_command}")
            return 128 + stopped_by
        self.finish()
        return 0

    def _take_steps(self) -> int | None:
        """Takes the steps that are left. Returns the signal that stopped it early, if one did."""
        report = self.config.report
        with ExitStack() as stack:
            interrupts = stack.enter_context(Interrupts())
            trackers = start_trackers(self.config, self.steps_done, self.console)
            self.metrics = MetricsLog(self.run_dir, self.steps_done, trackers, self.last_record)
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
                if stop is None and has_no_reader(self.console):
                    stop = signal.SIGPIPE
                last = self.steps_done == self.num_steps
                if last or stop is not None or self.steps_done % report.checkpoint_every == 0:
                    self._save()
                if stop is not None:
                    return stop
        return None

    @property
    def last_checkpoint(self) -> Path:
        return all_checkpoints(self.run_dir / "checkpoints")[-1]

    @property
    def plain_checkpoint(self) -> Path:
        """The last checkpoint of a finished run, as a plain Hugging Face folder."""
        return plain_folder(self.last_checkpoint)

    def autocast(self) -> torch.autocast:
        """In which the model computes, if compute.precision is bf16."""
        enabled = self.config.compute.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    @contextmanager
    def forward_pass(self) -> Iterator[None]:
        """In which the model computes what has a gradient."""
        offload = self.offload.forward_pass() if self.offload else nullcontext()
        with self.autocast(), offload:
            yield

    def update(
        self,
        learning_rate: float,
        losses: Sequence[Tensor],
        packs: Sequence[Trie],
        sources: Sequence[Sequence[str]],
    ) -> float:
        """Clips the gradient, moves the weights along it and clears it.

        Args:
            losses, packs, sources: of each micro-batch that the gradient is of: scalars on the
                device, its trie, and where its examples come from.

        Returns:
            The norm of the gradient before it was clipped.

        Raises:
            NotFiniteError: a loss or the norm; the weights and the micro-batches are saved.
        """
        largest = self.config.optimization.gradient_clip
        norm = clip_gradient(self.model, self.optimizer, largest)
        if not torch.isfinite(torch.stack([*losses, norm])).all():
            folder = self.run_dir / f"nan-step-{self.steps_done + 1}"
            self._write_model(folder / "model")
            raise save_batch(folder, packs, sources, [float(x) for x in losses], float(norm))
        set_learning_rate(self.optimizer, learning_rate)
        self.copies.free()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)

    def cost_of(self, passes: Sequence[Sized], trie_tokens: int) -> Record:
        """What the record of a step says of its passes, where there is a limit on them.

        Args:
            passes: of the step.
            trie_tokens: of the tries that they are parts of.
        """
        if self.pass_tokens is None:
            return {}
        repeated = sum(map(len, passes)) - trie_tokens
        largest = max(map(len, passes), default=0)
        self.add_to_totals(repeated_tokens=repeated)
        of_all = max(largest, self.totals.get("largest_pass_tokens", 0))
        self.totals["largest_pass_tokens"] = of_all
        return {
            "passes": len(passes),
            "largest_pass_tokens": largest,
            "repeated_tokens": repeated,
        }

    @property
    def total_cost(self) -> Record:
        """Likewise of all steps, for summary.json."""
        totals = self.totals
        if "repeated_tokens" not in totals:
            return {}
        share = totals["repeated_tokens"] / max(totals["trie_tokens"], 1)
        return {
            "computed_per_trie_token": 1 + share,
            "largest_pass_tokens": totals["largest_pass_tokens"],
        }

    def add_to_totals(self, **amounts: float) -> None:
        for name, amount in amounts.items():
            self.totals[name] = self.totals.get(name, 0) + amount

    def _save(self) -> None:
        # The checkpoint promises that the records of its steps are there.
        self.metrics.sync()
        self.totals["seconds"] = time.perf_counter() - self.origin
        state: dict[str, Any] = {
            "step": self.steps_done,
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
            "totals": self.totals,
            "last_record": self.metrics.last,
            "settings": settings_of(self.config),
            "data": self.fingerprint,
            "threads": torch.get_num_threads(),
        }
        if self.lora is not None:
            state["base"] = self._base_fingerprint
        is_last = self.steps_done == self.num_steps
        save_checkpoint(
            self.run_dir / "checkpoints",
            self.steps_done,
            self.model,
            self.tokenizer,
            state,
            self.config.report.keep_checkpoints,
            lambda folder: self._write_model(
                folder, export=is_last or self.config.report.export == "every"
            ),
        )

    def _write_model(self, folder: Path, export: bool = False) -> None:
        """A plain Hugging Face folder, or adapters, with such a folder inside if asked to."""
        if self.lora is None:
            save_model(self.model, self.tokenizer, folder)
        else:
            self.lora.write(folder, export)

    def _restore(self, checkpoint: Path, state: dict[str, Any]) -> None:
        check_shapes(checkpoint, state, self.model)
        if state["data"] != self.fingerprint:
            raise ConfigError(
                f"{self.trains_on} is not what {checkpoint} was trained on; resume with the "
                "same data or start another run"
            )
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["rng"])
            if self.device.type == "cuda" and state["cuda_rng"]:
                torch.cuda.set_rng_state_all(state["cuda_rng"])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise damaged_state(checkpoint, error) from error
        self.steps_done = state["step"]
        self.totals = state["totals"]
        self.last_record = state.get("last_record", {})  # older versions did not save it

    def _check_room(self) -> None:
        """Raises ConfigError if the checkpoints to come cannot all be written."""
        report, folder = self.config.report, self.run_dir / "checkpoints"
        to_come = -(-(self.num_steps - self.steps_done) // report.checkpoint_every)
        # One more than are kept, until the oldest is deleted.
        at_once = max(1, report.keep_checkpoints + 1 - len(all_checkpoints(folder)))
        count, models = min(to_come, at_once), 0
        if self.lora is not None and to_come:
            models = (count if report.export == "every" else 1) + self.lora.lacks_base
        check_room(self.run_dir, self.model, count, models)
