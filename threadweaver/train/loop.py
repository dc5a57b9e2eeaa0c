"""Supervised fine-tuning, from settings to a trained model. Reads top to bottom.

On the CPU the result is a function of the settings, the data and the number of threads, bit for
bit, however often the run was killed and resumed.
"""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import AutoModelForCausalLM

from threadweaver.data import load_examples
from threadweaver.eval import Evaluation, evaluate_autoregressive
from threadweaver.model import save_model, supervised_tokens, trie_loss
from threadweaver.tasks.multiplication import is_correct
from threadweaver.train.batches import (
    Step,
    TrieSet,
    all_steps,
    build_tries,
    pack,
    unrolled_tokens,
)
from threadweaver.train.checkpoint import (
    all_checkpoints,
    check_shapes,
    load_state,
    save_checkpoint,
)
from threadweaver.train.config import ConfigError, SFTConfig
from threadweaver.train.interrupt import Interrupts
from threadweaver.train.log import MetricsLog, ProgressLog
from threadweaver.train.not_finite import save_batch
from threadweaver.train.report import print_table
from threadweaver.train.run_dir import (
    check_run_dir,
    check_same_settings,
    resume_command,
    settings_of,
    write_config,
    write_whole,
)
from threadweaver.train.schedule import learning_rate
from threadweaver.train.setup import build_model, build_optimizer, load_problems, prepare_torch
from threadweaver.trajectory import Codec
from tw_kernels import Trie


def prepare(config: SFTConfig, resume: bool, console: Console) -> Trainer | None:
    """A trainer ready to run, at its start or where its newest checkpoint stands.

    None if the run is finished. Nothing is written to run_dir before all of it is known to be good.

    Raises:
        ValueError: settings or data that cannot be used.
    """
    run_dir = Path(config.run_dir)
    check_run_dir(run_dir, resume)
    if (run_dir / "summary.json").exists():
        console.print(f"{run_dir}: this run is finished, see {run_dir / 'summary.json'}")
        return None
    checkpoints = all_checkpoints(run_dir / "checkpoints")
    checkpoint = checkpoints[-1] if checkpoints else None
    state = load_state(checkpoint) if checkpoint else None
    if checkpoint and state:
        check_same_settings(config, state["settings"], checkpoint)
        console.print(f"resuming from {checkpoint}")
    trainer = Trainer(config, checkpoint, state, console)
    write_config(config)
    return trainer


class Trainer:
    """A model, its data, its optimizer, and how far it has come.

    Args:
        checkpoint, state: where to continue and what `load_state` gave for it; None: at the start.

    Raises:
        ValueError: settings or data that cannot be used.
    """

    def __init__(
        self,
        config: SFTConfig,
        checkpoint: Path | None,
        state: dict[str, Any] | None,
        console: Console,
    ):
        started = time.perf_counter()
        self.config = config
        self.console = console
        self.run_dir = Path(config.run_dir)
        self.device = prepare_torch(config, state)
        self.model, self.tokenizer = build_model(config, checkpoint)
        torch.nn.Module.to(self.model, self.device).train()
        self.codec = Codec.from_tokenizer(self.tokenizer)
        self.problems = load_problems(config)
        self.data = self._load(config.data.train)
        if not self.data.tries:
            raise ConfigError(f"data.train: {config.data.train} holds no well-formed trajectory")
        self.validation = self._load(config.data.validation) if config.data.validation else None
        self.num_steps, self.steps = all_steps(self.data.sizes, config.optimization, config.seed)
        self._probe()
        if config.compute.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        if config.compute.compile:
            self.model.base_model.compile(dynamic=True)
        self.optimizer = build_optimizer(self.model, config)
        self.steps_done = 0
        self.totals = {"trie_tokens": 0, "unrolled_tokens": 0, "step_seconds": 0.0, "seconds": 0.0}
        if checkpoint and state:
            self._restore(checkpoint, state)
        # So that now - origin is the wall-clock of the whole run, without the time it lay dead.
        self.origin = started - self.totals["seconds"]

    def run(self) -> int:
        """Trains to the end. Returns the exit code: 0, or 128 + the signal that stopped it.

        Raises:
            NotFiniteError: a step's loss or gradient norm.
        """
        stopped_by = self.fit()
        if stopped_by is not None:
            command = resume_command(self.run_dir)
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
            for step in islice(self.steps, self.steps_done, self.num_steps):
                record = self._train_step(step)
                self.steps_done += 1
                if self.validation and self._validation_is_due(step):
                    record["validation_loss"] = self._validation_loss(self.validation)
                self.metrics.write(record)
                progress.update(record)
                stop = interrupts.received
                last = self.steps_done == self.num_steps
                if last or stop is not None or self.steps_done % report.checkpoint_every == 0:
                    self._save()
                if stop is not None:
                    return stop
        return None

    def finish(self) -> None:
        """Evaluates the final checkpoint, writes summary.json and shows what came out."""
        checkpoint = all_checkpoints(self.run_dir / "checkpoints")[-1]
        evaluation = self._evaluate(checkpoint) if self.problems else None
        summary = {
            "train_loss": self.metrics.last["loss"],
            "validation_loss": self.metrics.last.get("validation_loss"),
            "accuracy": evaluation.accuracy if evaluation else None,
            "format_correct": evaluation.format_correct if evaluation else None,
            "steps": self.steps_done,
            "trie_tokens": self.totals["trie_tokens"],
            "unrolled_tokens": self.totals["unrolled_tokens"],
            "unrolled_per_trie_token": self.totals["unrolled_tokens"] / self.totals["trie_tokens"],
            "tokens_per_second": self.totals["trie_tokens"] / self.totals["step_seconds"],
            "dropped_calls": self.data.dropped_calls,
            "dropped_trajectories": self.data.dropped_trajectories,
            "seconds": time.perf_counter() - self.origin,
            "checkpoint": str(checkpoint),
        }
        write_whole(self.run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
        print_table(self.console, summary, self.run_dir)

    def _train_step(self, step: Step) -> dict[str, Any]:
        """One optimizer step; the loss is the mean over all supervised tokens of the step."""
        start = time.perf_counter()
        settings = self.config.optimization
        packs = [Trie.pack([self.data.tries[i] for i in micro]) for micro in step.micro_batches]
        supervised = sum(supervised_tokens(trie).numel() for trie in packs)
        losses = []
        for trie in packs:
            loss = self._loss_sum(trie) / supervised
            loss.backward()
            losses.append(loss.detach())
        losses = torch.stack(losses)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.gradient_clip)
        if not torch.isfinite(torch.stack([*losses, norm])).all():
            sources = [[self.data.sources[i] for i in micro] for micro in step.micro_batches]
            folder = self.run_dir / f"nan-step-{self.steps_done + 1}"
            save_model(self.model, self.tokenizer, folder / "model")
            raise save_batch(folder, packs, sources, losses.tolist(), float(norm))
        rate = learning_rate(
            self.steps_done, self.num_steps, settings.learning_rate, settings.warmup
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss_value, norm_value = float(losses.sum()), float(norm)  # waits for the GPU
        now = time.perf_counter()
        tokens = sum(map(len, packs))
        unrolled = sum(map(unrolled_tokens, packs))
        self.totals["trie_tokens"] += tokens
        self.totals["unrolled_tokens"] += unrolled
        self.totals["step_seconds"] += now - start
        return {
            "step": self.steps_done + 1,
            "epoch": step.epoch,
            "loss": loss_value,
            "gradient_norm": norm_value,
            "learning_rate": rate,
            "supervised_tokens": supervised,
            "trie_tokens": tokens,
            "unrolled_tokens": unrolled,
            "tokens_per_second": tokens / (now - start),
            "seconds": now - self.origin,
        }

    def _loss_sum(self, trie: Trie) -> Tensor:
        autocast = self.config.compute.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=autocast):
            return trie_loss(self.model, trie)

    def _validation_is_due(self, step: Step) -> bool:
        every = self.config.report.validate_every
        due = step.ends_epoch if every is None else self.steps_done % every == 0
        return due or self.steps_done == self.num_steps

    @torch.no_grad()
    def _validation_loss(self, data: TrieSet) -> float:
        """Mean over the supervised tokens of the validation data."""
        self.model.eval()
        total, supervised = 0.0, 0
        budget = self.config.optimization.batch_tokens
        for indices in pack(data.sizes, range(len(data.tries)), budget):
            trie = Trie.pack([data.tries[i] for i in indices])
            total += float(self._loss_sum(trie))
            supervised += supervised_tokens(trie).numel()
        self.model.train()
        return total / supervised

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
            "data": self.data.fingerprint,
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
        if state["data"] != self.data.fingerprint:
            raise ConfigError(
                f"data.train: {self.config.data.train} is not what {checkpoint} was trained on; "
                "resume with the same file or start another run"
            )
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and state["cuda_rng"]:
            torch.cuda.set_rng_state_all(state["cuda_rng"])
        self.steps_done = state["step"]
        self.totals = state["totals"]

    def _load(self, path: str) -> TrieSet:
        examples = track(
            load_examples(path),
            description=f"reading {path}",
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        settings = self.config
        data = build_tries(examples, self.codec, settings.data, settings.optimization.batch_tokens)
        unrolled = sum(map(unrolled_tokens, data.tries))
        self.console.print(
            f"{path}: {len(data.tries):,} tries, {sum(data.sizes):,} tokens ({unrolled:,} "
            f"unrolled), {data.dropped_calls:,} calls cut to fit optimization.batch_tokens, "
            f"{data.dropped_trajectories:,} malformed trajectories dropped",
            highlight=False,
            soft_wrap=True,
        )
        return data

    @torch.no_grad()
    def _probe(self) -> None:
        """Runs the smallest trie, so that a model that cannot run fails before training starts."""
        try:
            self._loss_sum(min(self.data.tries, key=len))
        except ValueError as error:
            field = "model.arch" if self.config.model.arch else "model.path"
            raise ConfigError(f"{field}: {error}") from error

    def _evaluate(self, checkpoint: Path) -> Evaluation:
        """Solves the problems with the checkpoint as plain transformers loads it."""
        torch.nn.Module.to(self.model, "cpu")
        self.optimizer.zero_grad()
        settings = self.config.evaluate
        model = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="sdpa")
        torch.nn.Module.to(model, self.device)
        with self.console.status(f"solving {len(self.problems)} problems"):
            return evaluate_autoregressive(
                model,
                self.tokenizer,
                self.problems,
                is_correct,
                max_new_tokens=settings.max_new_tokens,
                batch_size=settings.batch_size,
            )
