"""A run that takes optimizer steps: prepared, taken step by step, saved, stopped and resumed."""

from __future__ import annotations

import signal
import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from threadweaver import ranks
from threadweaver.command import is_out_of_memory
from threadweaver.model import (
    WeightCopies,
    end_ids,
    parameter_count,
    save_without_weights,
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
    shapes_of,
)
from threadweaver.train.config import ConfigError
from threadweaver.train.interrupt import Interrupts
from threadweaver.train.layers import layers_of
from threadweaver.train.log import LastRecord, MetricsLog, ProgressLog
from threadweaver.train.lora import RunAdapters
from threadweaver.train.memory.choice import choose_pass_tokens
from threadweaver.train.not_finite import save_batch
from threadweaver.train.offload import ActivationOffload
from threadweaver.train.optimizer import build_optimizer, clip_gradient, set_learning_rate
from threadweaver.train.run import Run
from threadweaver.train.run_dir import check_same_settings, settings_of
from threadweaver.train.same_on_ranks import check_data, generator_states, restore_generators
from threadweaver.train.setup import build_passes, compile_layers, recompute_activations
from threadweaver.train.sharded_checkpoint import (
    has_shards,
    load_optimizer,
    missing_shards,
    save_shards,
    take_whole_optimizer,
)
from threadweaver.train.sharding import export, gathered, sum_gradients
from threadweaver.train.stages import RLConfig, SFTConfig
from threadweaver.train.trackers import start_trackers
from threadweaver.trajectory import Codec
from tw_kernels import Trie

STATE_KEYS = (
    "step",
    "rng",
    "cuda_rng",
    "totals",
    "settings",
    "data",
    "threads",
    "shapes",
)
T = TypeVar("T", bound=SFTConfig | RLConfig)
Record = dict[str, Any]


class Trainer(Run[T]):
    """A model, its optimizer, and how far it has come.

    A kind of training is a subclass that says what it trains on and what one step does.

    Attributes:
        num_steps: steps of the whole run; set by `load_data`.
        trains_on: the setting that names the data, and its value; set by `load_data`.
        fingerprint: of the data; set by `load_data`.
        last_record: of the last step that a checkpoint knows of.
        totals: sums over the steps done, by name; they live in checkpoints.
        model: what is trained.
        passes: what runs it; all passes go through it, since its weights may be elsewhere before.
        lora: the adapters that are trained in place of the weights; None: the weights are.
        offload: of its activations, if compute.activation_offload is set.
        pass_tokens: most tokens of a pass: compute.pass_tokens or, without it, what a GPU has
            memory for; None: no limit.
        copies: of its matrices in the dtype of their products; cast before the passes of a step.
    """

    num_steps: int
    trains_on: str
    fingerprint: str
    lora: RunAdapters | None = None
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
        def find() -> None:
            if checkpoints := all_checkpoints(self.run_dir / "checkpoints"):
                checkpoint = checkpoints[-1]
                self.state = load_state(checkpoint, *STATE_KEYS)
                check_same_settings(self.config, self.state["settings"], checkpoint)
                if "optimizer" not in self.state and not has_shards(checkpoint):
                    raise missing_shards(checkpoint)
                print_line(self.console, f"resuming from {checkpoint}")

        ranks.on_first(find)
        if ranks.size() > 1:
            state = self.state or {}
            # The moments of all weights, if one process wrote them, stay on rank 0.
            kept = ["optimizer"] if self.config.model.lora is None else []
            small = ranks.from_first({k: v for k, v in state.items() if k not in kept})
            self.state = {**small, **state} or None

    def load(self) -> None:
        compute, has_lora = self.config.compute, self.config.model.lora is not None
        checkpoint = self.last_checkpoint if self.state and not has_lora else None
        self.passes, self.tokenizer = build_passes(self.config, checkpoint, self.device)
        self.model = self.passes.model
        print_line(self.console, f"model: {parameter_count(self.model)}")
        self.lora = self._add_adapters() if has_lora else None
        self.model.train()
        self.codec = Codec.from_tokenizer(self.tokenizer, end_ids(self.model), self.config.template)
        self.totals: dict[str, float] = {"seconds": 0.0}
        self.last_record: Record = {}
        self.steps_done = 0
        self.pass_tokens = self._settle_passes()
        self.load_data()
        check_data(self.trains_on, self.fingerprint)
        if compute.compile:
            compile_layers(self.model)
        if compute.activation_offload:
            self.offload = ActivationOffload(self.model)
        if compute.gradient_checkpointing:
            recompute_activations(self.model, compute.gradient_checkpointing, self.offload)
        # On a CPU autocast casts as it always did: results stay the same, bit for bit. Sharded
        # parameters are gathered in the dtype of their products.
        by_copies = self.device.type == "cuda" and compute.precision == "bf16" and ranks.size() == 1
        compiled = layers_of(self.model) if compute.compile else []
        self.copies = WeightCopies(self.model, torch.bfloat16 if by_copies else None, compiled)
        self.optimizer = build_optimizer(self.model, self.config.optimization)
        if self.state:
            self._restore(self.last_checkpoint, self.state)
            self.state = None  # the moments take twice the memory of the weights
        ranks.on_first(self._check_room)
        # So that now - origin is the wall-clock of the whole run, less the time between stop and
        # resume.
        self.origin = self.started - self.totals["seconds"]

    def _settle_passes(self) -> int | None:
        """compute.pass_tokens, or what a GPU has memory for, which is shown."""
        compute = self.config.compute
        if compute.pass_tokens is not None or self.device.type != "cuda":
            return compute.pass_tokens
        with Progress(self.console, "counting the memory of an update", None, "counts"):
            # Here, and not where --plan is asked about.
            here = replace(compute, device_gb=None, ranks=None)
            config = replace(self.config, compute=here)
            choice = ranks.on_first(lambda: choose_pass_tokens(config))
        if choice.note:
            print_line(self.console, choice.note)
        return choice.tokens

    def _add_adapters(self) -> RunAdapters:
        """Those of the checkpoint that the run continues from, or new ones."""
        base = weights_fingerprint(self.model, gathered(self.model) if ranks.size() > 1 else None)
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
            if ranks.is_first():
                trackers = start_trackers(self.config, self.steps_done, self.console)
                self.metrics = MetricsLog(self.run_dir, self.steps_done, trackers, self.last_record)
            else:
                self.metrics = LastRecord(self.last_record)
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
                stop = ranks.largest(stop or 0) or None  # all stop at the same step
                last = self.steps_done == self.num_steps
                if last or stop is not None or self.steps_done % report.checkpoint_every == 0:
                    self._save()
                if stop is not None:
                    return stop
        return None

    @property
    def last_checkpoint(self) -> Path:
        return ranks.on_first(lambda: all_checkpoints(self.run_dir / "checkpoints")[-1])

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
        sum_gradients(self.model)
        largest = self.config.optimization.gradient_clip
        norm = clip_gradient(self.model, self.optimizer, largest)
        is_finite = bool(torch.isfinite(torch.stack([*losses, norm])).all())
        if ranks.largest(not is_finite):
            folder = self.run_dir / f"nan-step-{self.steps_done + 1}"
            self._write_model(folder / "model", plain=self.is_sharded)
            micro_batches = zip(packs, sources, map(float, losses), strict=True)
            of_all = list(chain(*ranks.gather(list(micro_batches))))
            packs, sources, values = zip(*of_all, strict=True)
            raise ranks.on_first(lambda: save_batch(folder, packs, sources, values, float(norm)))
        set_learning_rate(self.optimizer, learning_rate)
        self.copies.free()
        if not getattr(self.optimizer, "state", True):  # an offloaded one has it on the host
            # The first step makes the moments: not in the midst of what activations took, which
            # then could not be given back to rollouts.
            torch.cuda.empty_cache()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)

    def cost_of(self, passes: Sequence[int], trie_tokens: int) -> Record:
        """What the record of a step says of its passes, where there is a limit on them.

        Args:
            passes: tokens of each pass of the step, on all ranks.
            trie_tokens: of the tries that they are parts of.
        """
        if self.pass_tokens is None:
            return {}
        repeated = sum(passes) - trie_tokens
        largest = max(passes, default=0)
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
            **generator_states(),
            "totals": self.totals,
            "last_record": self.metrics.last,
            "settings": settings_of(self.config),
            "data": self.fingerprint,
            "threads": torch.get_num_threads(),
            "shapes": shapes_of(self.model),
        }
        if not self.is_sharded:
            state["optimizer"] = self.optimizer.state_dict()
        if self.lora is not None:
            state["base"] = self._base_fingerprint
        plain = self.steps_done == self.num_steps or self.config.report.export == "every"

        def write(folder: Path) -> None:
            self._write_model(folder, plain)
            if self.is_sharded:
                save_shards(folder, self.model, self.optimizer)

        save_checkpoint(
            self.run_dir / "checkpoints",
            self.steps_done,
            write,
            state,
            self.config.report.keep_checkpoints,
        )

    @property
    def is_sharded(self) -> bool:
        """Whether what is trained is divided among the ranks: each has all adapters."""
        return ranks.size() > 1 and self.lora is None

    def _write_model(self, folder: Path, plain: bool) -> None:
        """What a folder of this model has; all ranks call it. Adapters; or a plain Hugging Face
        folder, which a sharded model is only if it is to be `plain`."""
        if self.lora is not None:
            self.lora.write(folder, plain)
        elif plain or not self.is_sharded:
            export(self.model, self.tokenizer, folder)
        elif ranks.is_first():
            save_without_weights(self.model, self.tokenizer, folder)

    def _restore(self, checkpoint: Path, state: dict[str, Any]) -> None:
        check_shapes(checkpoint, state, self.model)
        if state["data"] != self.fingerprint:
            raise ConfigError(
                f"{self.trains_on} is not what {checkpoint} was trained on; resume with the "
                "same data or start another run"
            )
        try:
            if has_shards(checkpoint):
                load_optimizer(checkpoint, self.model, self.optimizer)
            elif self.is_sharded:
                take_whole_optimizer(state.get("optimizer"), self.model, self.optimizer)
            else:
                self.optimizer.load_state_dict(state["optimizer"])
            restore_generators(state, self.config.seed)
        except ConfigError:
            raise
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            raise damaged_state(checkpoint, error) from error
        self.steps_done = state["step"]
        self.totals = state["totals"]
        self.last_record = state.get("last_record", {})  # older versions did not save it

    def _check_room(self) -> None:
        """On rank 0. Raises ConfigError if the checkpoints to come cannot all be written."""
        report, folder = self.config.report, self.run_dir / "checkpoints"
        to_come = -(-(self.num_steps - self.steps_done) // report.checkpoint_every)
        # One more than are kept, until the oldest is deleted.
        at_once = max(1, report.keep_checkpoints + 1 - len(all_checkpoints(folder)))
        count, models = min(to_come, at_once), 0
        if to_come and (self.lora is not None or self.is_sharded):
            models = count if report.export == "every" else 1
        if self.lora is not None:
            models += self.lora.lacks_base
        sharing = ranks.size() if self.is_sharded else 1
        optimizer = self.config.optimization.optimizer
        check_room(self.run_dir, self.model, optimizer, count, models, sharing)
