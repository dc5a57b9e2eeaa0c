"""Supervised fine-tuning: the steps of a run over a file of trajectories, and its evaluation."""

from __future__ import annotations

import time
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from threadweaver import ranks
from threadweaver.data import columns_note, is_data_path, read_examples
from threadweaver.data.files import data_files
from threadweaver.data.overlap import texts_of_files
from threadweaver.evaluate.metrics import compare
from threadweaver.evaluate.modes import evaluate_modes
from threadweaver.evaluate.rollouts import fitting
from threadweaver.generate.engine import Engine
from threadweaver.model import (
    context_length,
    load_model,
    supervised_tokens,
    to_device,
    trie_loss,
)
from threadweaver.progress import Progress, print_line
from threadweaver.tasks import load_task
from threadweaver.train.batches import (
    Step,
    TrieSet,
    all_steps,
    build_tries,
    pack,
    unrolled_tokens,
)
from threadweaver.train.config import ConfigError
from threadweaver.train.deal import Cost, deal
from threadweaver.train.report import print_sft_table
from threadweaver.train.rollout_model import RolloutModel
from threadweaver.train.run import Record, Trainer
from threadweaver.train.run_dir import write_json
from threadweaver.train.schedule import learning_rate
from threadweaver.train.stages import SFTConfig
from tw_kernels import Trie


class Dealt(NamedTuple):
    """What one rank computes of some micro-batches.

    Attributes:
        mine: its micro-batches, each the indices of its tries.
        packs: the same as tries.
        fillers: tries to run for nothing, as often as other ranks have one micro-batch more.
        imbalance: as `Deal.imbalance`.
    """

    mine: list[list[int]]
    packs: list[Trie]
    fillers: list[Trie]
    imbalance: float


class SFTTrainer(Trainer[SFTConfig]):
    """Supervised fine-tuning on the tries of a data file."""

    def load(self) -> None:
        config = self.config
        # What needs no model is checked first: a large one takes minutes to load.
        for path in filter(None, (config.data.train, config.data.validation)):
            data_files(path)
        if config.evaluate.data is not None:
            self._load_problems(config.evaluate.data)
        super().load()

    def load_data(self) -> None:
        config = self.config
        self.data = self._load_tries(config.data.train)
        if not self.data.tries:
            raise ConfigError(f"data.train: {config.data.train} holds no well-formed trajectory")
        path = config.data.validation
        self.validation = self._load_tries(path) if path else None
        self.report_overlap(texts_of_files([config.data.train]))
        self.trains_on = f"data.train: {config.data.train}"
        self.fingerprint = self.data.fingerprint
        self.num_steps, self._all_steps = all_steps(
            self.data.sizes, config.optimization, config.seed
        )
        self._next_step = 0
        self.cost = Cost(self.model)
        self._probe()
        if config.evaluate.data is not None:
            self._check_evaluation()

    def finish(self) -> None:
        """Evaluates the final checkpoint, writes summary.json and shows what came out."""
        checkpoint = self.last_checkpoint
        summary = {
            "train_loss": self.metrics.last["loss"],
            "validation_loss": self.metrics.last.get("validation_loss"),
            **(self._evaluate(checkpoint) if self.config.evaluate.data else {}),
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
        print_sft_table(self.console, summary, self.run_dir)
        ranks.on_first(lambda: write_json(self.run_dir / "summary.json", summary | self.overlap))

    def train_step(self) -> Record:
        # The steps are dealt in order; a resumed run takes up where it was.
        skipped = self.steps_done - self._next_step
        self._next_step = self.steps_done + 1
        return self.train_on(next(islice(self._all_steps, skipped, None)))

    def train_on(self, step: Step) -> Record:
        """One optimizer step; the loss is the mean over all supervised tokens of the step."""
        start = time.perf_counter()
        tries = [self.data.tries[i] for micro in step.micro_batches for i in micro]
        supervised = sum(supervised_tokens(trie).numel() for trie in tries)
        mine, packs, fillers, imbalance = self._dealt(self.data, step.micro_batches)
        losses = []
        self.copies.cast()
        with self._micro_batches("training", len(packs) + len(fillers)) as progress:
            for trie in progress.track(packs):
                loss = self._loss_sum(trie) / supervised
                loss.backward()
                losses.append(loss.detach())
            for trie in progress.track(fillers):
                (0 * self._loss_sum(trie)).backward()
        settings = self.config.optimization
        rate = learning_rate(
            self.steps_done, self.num_steps, settings.learning_rate, settings.warmup
        )
        sources = [[self.data.sources[i] for i in micro] for micro in mine]
        norm = self.update(rate, losses, packs, sources)
        loss_value = float(torch.stack(losses).sum()) if losses else 0.0
        (loss_value,) = ranks.sums([loss_value])
        seconds = time.perf_counter() - start
        tokens = sum(map(len, tries))
        unrolled = sum(map(unrolled_tokens, tries))
        self.add_to_totals(trie_tokens=tokens, unrolled_tokens=unrolled, step_seconds=seconds)
        record = {
            "epoch": step.epoch,
            "loss": loss_value,
            "gradient_norm": norm,
            "learning_rate": rate,
            "supervised_tokens": supervised,
            "trie_tokens": tokens,
            "unrolled_tokens": unrolled,
            "tokens_per_second": tokens / seconds,
        }
        if ranks.size() > 1:
            record["imbalance"] = imbalance
        if self.validation and self._validation_is_due(step):
            record["validation_loss"] = self._validation_loss(self.validation)
        return record

    def _dealt(self, data: TrieSet, micro_batches: list[list[int]]) -> Dealt:
        """What this rank computes of some micro-batches."""
        costs = [sum(self.cost(data.tries[i]) for i in micro) for micro in micro_batches]
        dealt = deal(costs, ranks.size())
        mine = [micro_batches[i] for i in dealt.of_ranks[ranks.rank()]]
        packs = [Trie.pack([data.tries[i] for i in micro]) for micro in mine]
        fillers = [min(data.tries, key=len)] * (dealt.passes - len(mine))
        return Dealt(mine, packs, fillers, dealt.imbalance)

    def _loss_sum(self, trie: Trie) -> Tensor:
        with self.autocast():
            return self.passes(trie_loss, trie)

    def _micro_batches(self, title: str, count: int) -> Progress:
        title = f"{title}, step {self.steps_done + 1}"
        return Progress(self.console, title, count, "micro-batches")

    def _validation_is_due(self, step: Step) -> bool:
        every = self.config.report.validate_every
        done = self.steps_done + 1
        due = step.ends_epoch if every is None else done % every == 0
        return due or done == self.num_steps

    @torch.no_grad()
    def _validation_loss(self, data: TrieSet) -> float:
        """Mean over the supervised tokens of the validation data."""
        self.model.eval()
        self.copies.cast()
        total, supervised = 0.0, 0
        budget = self.config.optimization.batch_tokens
        _, packs, fillers, _ = self._dealt(data, pack(data.sizes, range(len(data.tries)), budget))
        with self._micro_batches("validating", len(packs) + len(fillers)) as progress:
            for trie in progress.track(packs):
                total += float(self._loss_sum(trie))
                supervised += supervised_tokens(trie).numel()
            for trie in progress.track(fillers):
                self._loss_sum(trie)
        self.model.train()
        total, supervised = ranks.sums([total, supervised])
        return total / supervised

    def _load_tries(self, path: str) -> TrieSet:
        with Progress(self.console, f"reading {path}", None, "rows") as progress:
            examples = list(progress.track(read_examples(path, codec=self.codec)))
        print_line(self.console, columns_note(path, examples))
        budget = self.config.optimization.batch_tokens
        with Progress(self.console, f"building tries of {path}", len(examples), "rows") as progress:
            data = build_tries(
                progress.track(examples),
                self.codec,
                self.config.data,
                budget,
                context_length(self.model),
            )
        unrolled = sum(map(unrolled_tokens, data.tries))
        print_line(
            self.console,
            f"{path}: {len(data.tries):,} tries, {sum(data.sizes):,} tokens ({unrolled:,} "
            f"unrolled), {data.dropped_calls:,} calls cut to fit optimization.batch_tokens, "
            f"{data.dropped_trajectories:,} malformed trajectories dropped",
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

    def _load_problems(self, name: str) -> None:
        config = self.config.evaluate
        count = config.problems
        try:
            if is_data_path(name):
                self.task = load_task(name, **{"held_out": 1.0, **config.options})
                self.problems = self.task.problems("validation", None)[:count]
            else:
                self.task = load_task(name, **config.options)
                self.problems = self.task.problems("validation", count, self.config.seed)
        except ValueError as error:
            raise ConfigError(f"evaluate.data: {error}") from error
        for note in getattr(self.task, "notes", ()):
            print_line(self.console, note)

    def _check_evaluation(self) -> None:
        """Leaves out prompts that do not fit, and refuses what the engine would refuse when all
        training is done."""
        try:
            model = RolloutModel(self.model, self.tokenizer, self.config.compute).model
            engine, generation = self._engine(model), self.config.evaluate.generation
            self.problems, self.skipped_prompts, notes = fitting(engine, self.problems, generation)
        except ValueError as error:
            raise ConfigError(f"evaluate: {error}") from error
        for note in notes:
            print_line(self.console, f"evaluate: {note}")

    def _evaluate(self, checkpoint: Path) -> dict[str, float]:
        """Solves the problems with the checkpoint as it can be loaded, in both modes."""
        self.copies.free()
        if ranks.size() == 1:  # else it is a small part
            torch.nn.Module.to(self.model, "cpu")
        self.optimizer.zero_grad()
        model, _ = load_model(checkpoint)
        to_device(model, self.device)
        evaluations = evaluate_modes(
            ("sequential", "parallel"),
            self._engine(model),
            self.task,
            self.problems,
            self.config.evaluate.generation,
            self.console,
            seed=self.config.seed,
        )
        gain = compare(**evaluations)
        alone, threads = (e.metrics() for e in evaluations.values())
        return {
            "skipped_prompts": self.skipped_prompts,
            "accuracy": alone["accuracy"].value,
            "format": alone["format"].value,
            "parallel_accuracy": threads["accuracy"].value,
            "parallel_format": threads["format"].value,
            "parallel_activation": threads["activation"].value,
            "speedup": gain.speedup.value,
            "wall_clock_speedup": gain.wall_clock_speedup,
        }

    def _engine(self, model: PreTrainedModel) -> Engine:
        return Engine(model, self.codec, **asdict(self.config.evaluate.engine))
