"""Supervised fine-tuning: the steps of a run over a file of trajectories, and its evaluation."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from threadweaver import ranks
from threadweaver.data import columns_note, is_data_path, read_examples
from threadweaver.data.files import data_files
from threadweaver.data.overlap import texts_of_files
from threadweaver.evaluate.metrics import compare
from threadweaver.evaluate.modes import evaluate_modes
from threadweaver.evaluate.rollouts import fitting
from threadweaver.generate.engine import Engine
from threadweaver.generate.load import load_engine
from threadweaver.generate.options import EngineSettings
from threadweaver.model import (
    context_length,
    supervised_tokens,
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
from threadweaver.train.passes import split
from threadweaver.train.report import print_sft_table
from threadweaver.train.rollout_model import RolloutModel
from threadweaver.train.run_dir import write_json
from threadweaver.train.schedule import cosine_rate
from threadweaver.train.stages import SFTConfig
from threadweaver.train.trainer import Record, Trainer
from tw_kernels import Trie


@dataclass(frozen=True)
class Dealt:
    """What one rank computes of some passes.

    Attributes:
        mine: by index.
        fillers: tries to run for nothing, as often as other ranks have one pass more.
        imbalance: as `Deal.imbalance`.
    """

    mine: list[int]
    fillers: list[Trie]
    imbalance: float

    @property
    def count(self) -> int:
        """Passes that this rank, and each other, runs."""
        return len(self.mine) + len(self.fillers)


class SFTTrainer(Trainer[SFTConfig]):
    """Supervised fine-tuning on the tries of a data file."""

    def load(self) -> None:
        config = self.config
        # What needs no model is checked first: a large one takes minutes to load.
        for field in ("train", "validation"):
            if path := getattr(config.data, field):
                try:
                    data_files(path)
                except ValueError as error:
                    raise ConfigError(f"data.{field}: {error}") from error
        if config.evaluate.data is not None:
            self._load_problems(config.evaluate.data)
        super().load()

    def load_data(self) -> None:
        config = self.config
        self.data = self._load_tries("train", config.data.train)
        path = config.data.validation
        self.validation = self._load_tries("validation", path) if path else None
        self.report_overlap(texts_of_files([config.data.train]))
        self.trains_on = f"data.train: {config.data.train}"
        self.fingerprint = self.data.fingerprint
        self.num_steps, self._all_steps = all_steps(
            self.data.sizes, config.optimization, config.seed
        )
        self._next_step = 0
        self.cost = Cost(self.model)
        self.filler = self._passes(min(self.data.tries, key=len))[0]
        self._probe()
        if config.evaluate.data is not None:
            self._check_evaluation()

    def finish(self) -> None:
        """Evaluates the final checkpoint, writes summary.json and shows what came out."""
        checkpoint = self.plain_checkpoint
        summary = {
            "train_loss": self.metrics.last["loss"],
            "validation_loss": self.metrics.last.get("validation_loss"),
            **(self._evaluate(checkpoint) if self.config.evaluate.data else {}),
            "steps": self.steps_done,
            "trie_tokens": self.totals["trie_tokens"],
            "unrolled_tokens": self.totals["unrolled_tokens"],
            "unrolled_per_trie_token": self.totals["unrolled_tokens"] / self.totals["trie_tokens"],
            **self.total_cost,
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
        packs = [Trie.pack([self.data.tries[i] for i in micro]) for micro in step.micro_batches]
        supervised = sum(supervised_tokens(trie).numel() for trie in packs)
        passes, sources = [], []
        for trie, micro in zip(packs, step.micro_batches, strict=True):
            parts = self._passes(trie)
            passes += parts
            sources += [[self.data.sources[i] for i in micro]] * len(parts)
        dealt = self._dealt(passes)
        mine, sources = ([of_all[i] for i in dealt.mine] for of_all in (passes, sources))
        losses = []
        self.copies.cast()
        with self._passes_progress("training", dealt.count) as progress:
            for trie in progress.track(mine):
                loss = self._loss_sum(trie) / supervised
                loss.backward()
                losses.append(loss.detach())
            for trie in progress.track(dealt.fillers):
                (0 * self._loss_sum(trie)).backward()
        settings = self.config.optimization
        rate = cosine_rate(self.steps_done, self.num_steps, settings.learning_rate, settings.warmup)
        norm = self.update(rate, losses, mine, sources)
        loss_value = float(torch.stack(losses).sum()) if losses else 0.0
        (loss_value,) = ranks.sums([loss_value])
        seconds = time.perf_counter() - start
        tokens = sum(map(len, packs))
        unrolled = sum(map(unrolled_tokens, packs))
        self.add_to_totals(trie_tokens=tokens, unrolled_tokens=unrolled, step_seconds=seconds)
        record = {
            "epoch": step.epoch,
            "loss": loss_value,
            "gradient_norm": norm,
            "learning_rate": rate,
            "supervised_tokens": supervised,
            "trie_tokens": tokens,
            "unrolled_tokens": unrolled,
            **self.cost_of(list(map(len, passes)), tokens),
            "tokens_per_second": tokens / seconds,
        }
        if ranks.size() > 1:
            record["imbalance"] = dealt.imbalance
        if self.validation and self._validation_is_due(step):
            record["validation_loss"] = self._validation_loss(self.validation)
        return record

    def _dealt(self, passes: Sequence[Trie]) -> Dealt:
        """What this rank computes of the passes of all."""
        dealt = deal([self.cost(trie) for trie in passes], ranks.size())
        mine = dealt.of_ranks[ranks.rank()]
        return Dealt(mine, [self.filler] * (dealt.passes - len(mine)), dealt.imbalance)

    def _loss_sum(self, trie: Trie) -> Tensor:
        with self.forward_pass():
            return self.passes(trie_loss, trie)

    def _passes(self, trie: Trie) -> list[Trie]:
        most = self.pass_tokens
        return [trie] if most is None else [part.trie for part in split(trie, most)]

    def _passes_progress(self, title: str, count: int) -> Progress:
        title = f"{title}, step {self.steps_done + 1}"
        unit = "micro-batches" if self.pass_tokens is None else "passes"
        return Progress(self.console, title, count, unit)

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
        packs = pack(data.sizes, range(len(data.tries)), budget)
        tries = (Trie.pack([data.tries[i] for i in indices]) for indices in packs)
        passes = [part for trie in tries for part in self._passes(trie)]
        dealt = self._dealt(passes)
        with self._passes_progress("validating", dealt.count) as progress:
            for trie in progress.track([passes[i] for i in dealt.mine]):
                total += float(self._loss_sum(trie))
                supervised += supervised_tokens(trie).numel()
            for trie in progress.track(dealt.fillers):
                self._loss_sum(trie)
        self.model.train()
        total, supervised = ranks.sums([total, supervised])
        return total / supervised

    def _load_tries(self, field: str, path: str) -> TrieSet:
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
        if not data.tries:
            raise ConfigError(f"data.{field}: {path} holds no well-formed trajectory")
        most = self.pass_tokens
        paths = [int(trie.positions.max()) + 1 for trie in data.tries]
        if most is not None and (longer := [n for n in paths if n > most]):
            print_line(
                self.console,
                f"{path}: paths of {len(longer):,} tries are longer than compute.pass_tokens "
                f"({most:,}), and so are their passes: up to {max(longer):,} tokens",
            )
        return data

    @torch.no_grad()
    def _probe(self) -> None:
        """Runs a small trie, so that a model that cannot run fails before training starts."""
        try:
            self._loss_sum(self.filler)
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
            evaluate, half = self.config.evaluate, self.config.compute.precision == "bf16"
            engine = Engine(model, self.codec, **asdict(evaluate.engine), autocast=half)
            self.problems, self.skipped_prompts, notes = fitting(
                engine, self.problems, evaluate.generation
            )
        except ValueError as error:
            raise ConfigError(f"evaluate: {error}") from error
        for note in notes:
            print_line(self.console, f"evaluate: {note}")

    def _evaluate(self, checkpoint: Path) -> dict[str, float]:
        """Solves the problems with the checkpoint as it can be loaded, in both modes."""
        config = self.config
        self.copies.free()
        self.optimizer.zero_grad()
        del self.optimizer  # its state is saved
        if ranks.size() == 1:  # else it is a small part
            torch.nn.Module.to(self.model, "cpu")
        settings = EngineSettings(
            **asdict(config.evaluate.engine),
            device=config.compute.device,
            precision=config.compute.precision,
        )
        engine, _ = load_engine(str(checkpoint), settings, parallel=True, template=config.template)
        evaluations = evaluate_modes(
            ("sequential", "parallel"),
            engine,
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
