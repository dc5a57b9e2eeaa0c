"""Self-training: roll out, keep what is right and well formed, fine-tune on it
(docs/semantics.md, "Stages and published defaults").

    run_dir/rollouts/chunk-N.json   every rollout of a chunk of problems, graded, and their means
    run_dir/kept.jsonl              what was kept, as SFT reads it
    run_dir/selection.json          how many were kept, and why the others were not
    run_dir/sft/                    the run of SFT on it
    run_dir/summary.json            all of it; the first chunk's problems before and after

A killed run loses at most the chunk it was in: chunks are rolled out one after another, each by
itself, so a resumed run gets the same rollouts. So does one on another number of ranks: those share
out the problems of each chunk, and rank 0 reads and writes all files.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from threadweaver import ranks
from threadweaver.data import save_rows, trajectory_row
from threadweaver.device import give_back_memory
from threadweaver.evaluate.grade import Graded, graded_row, summary
from threadweaver.evaluate.progress import SharedProgress
from threadweaver.evaluate.rollouts import fingerprint, fitting, roll_out, texts_of_problems
from threadweaver.generate.engine import Engine
from threadweaver.generate.settings import PromptTooLong
from threadweaver.model import end_ids, to_device
from threadweaver.progress import print_line
from threadweaver.tasks import load_task
from threadweaver.train.config import ConfigError, DataConfig
from threadweaver.train.report import print_self_train_table
from threadweaver.train.run import Run
from threadweaver.train.run_dir import (
    check_same_config,
    checkpoint_of,
    has_begun,
    read_json,
    write_json,
)
from threadweaver.train.setup import build_model
from threadweaver.train.sft import SFTTrainer
from threadweaver.train.stages import SelfTrainConfig, SFTConfig
from threadweaver.trajectory import Codec, Rendered, extract_calls
from threadweaver.trajectory.loss import Loss

MOST_REASONS = 10
Row = dict[str, Any]


class SelfTraining(Run[SelfTrainConfig]):
    """One run of self-training, up to where it was stopped."""

    def find_state(self) -> None:
        """Before its first chunk it may have any settings, and those of SFT until SFT begins."""

        def check() -> None:
            if has_begun(self.run_dir):
                unused = [] if has_begun(self.run_dir / "sft") else ["optimization", "loss"]
                check_same_config(self.config, unused)

        ranks.on_first(check)

    def load(self) -> None:
        config = self.config
        self.task = load_task(config.task.name, **config.task.options)
        for note in getattr(self.task, "notes", ()):
            print_line(self.console, note)
        problems = self.task.problems("train", config.task.problems, config.seed)
        self.report_overlap(texts_of_problems(problems))
        size = config.rollouts.chunk
        self.chunks = [problems[i : i + size] for i in range(0, len(problems), size)]
        self.is_selected, self.missing = ranks.on_first(self._what_is_there)
        self.engine = None
        if self.missing and not self.is_selected:
            self.engine = self._engine(None)
            if note := self.engine.pool_note:
                print_line(self.console, f"rollouts: {note}")
            budget = config.optimization.batch_tokens
            for note in fitting(self.engine, problems, config.rollouts.generation, budget).notes:
                print_line(self.console, f"training problems: {note}")

    def _what_is_there(self) -> tuple[bool, list[int]]:
        """Whether what SFT trains on is selected, which its settings may change until it begins;
        and the chunks that are not rolled out. Raises ConfigError if the first is of other
        problems."""
        if self._chunk_file(0).exists():
            self._chunk(0)
        made = [self.run_dir / name for name in ("selection.json", "kept.jsonl")]
        is_selected = all(path.exists() for path in (*made, self._chunk_file(0)))
        is_selected = is_selected and has_begun(self.run_dir / "sft")
        numbers = range(len(self.chunks))
        return is_selected, [n for n in numbers if not self._chunk_file(n).exists()]

    def work(self) -> int:
        """See `Run`.

        Raises:
            ConfigError: nothing was kept; says why.
        """
        if not self.is_selected:
            self._roll_out_missing()
            ranks.on_first(self._select)
        self.engine = None  # SFT needs the memory
        selection = ranks.on_first(
            lambda: read_json(self.run_dir / "selection.json", "rollouts", "kept", "rejected")
        )
        config, folder = self.config, self.run_dir / "sft"
        settings = SFTConfig(
            run_dir=str(folder),
            data=DataConfig(
                train=str(self.run_dir / "kept.jsonl"),
                loss=config.loss,
                max_depth=config.rollouts.generation.max_depth,
            ),
            model=config.model,
            template=config.template,
            optimization=config.optimization,
            compute=config.compute,
            report=replace(config.report, overlap=[]),  # the problems are the same
            seed=config.seed,
        )
        trainer = SFTTrainer.prepare(settings, None, self.console)
        if trainer is not None:
            trainer.resume_command = self.resume_command
            if code := trainer.run():
                return code
        del trainer  # the evaluation needs the memory
        checkpoint = ranks.on_first(lambda: checkpoint_of(folder))
        means, budget = ranks.on_first(self._before)
        engine = self._engine(checkpoint)
        after = self._roll_out(engine, 0, "rolling out after SFT", budget)
        result = {
            **selection,
            "before": means,
            "after": summary(after),
            "checkpoint": str(checkpoint),
        }
        print_self_train_table(self.console, result)
        ranks.on_first(lambda: write_json(self.run_dir / "summary.json", result | self.overlap))
        return 0

    def _before(self) -> tuple[dict[str, float], int | None]:
        """Means of the first chunk, and the budget that its prompts were held to."""
        chunk = self._chunk(0)
        return chunk["means"], chunk.get("batch_tokens")  # older chunks: to none

    def _roll_out_missing(self) -> None:
        engine, count = self.engine, len(self.chunks)
        budget = self.config.optimization.batch_tokens
        for n in self.missing:
            assert engine is not None
            graded = self._roll_out(engine, n, f"rolling out {n + 1}/{count}", budget)
            ranks.on_first(partial(self._write_chunk, engine, n, graded))

    def _write_chunk(self, engine: Engine, number: int, graded: Sequence[Graded]) -> None:
        problems = self.chunks[number]
        record = {
            "problems": fingerprint(problems),
            "means": summary(graded),
            "batch_tokens": self.config.optimization.batch_tokens,
            "skipped_prompts": len(problems) - len(graded) // self.config.rollouts.samples,
            "rollouts": [{**graded_row(g), **self._lengths(g, engine)} for g in graded],
        }
        write_json(self._chunk_file(number), record, indent=None)

    def _select(self) -> None:
        """Writes what is kept."""
        chunks = [self._chunk(n) for n in range(len(self.chunks))]
        rows = [row for chunk in chunks for row in chunk["rollouts"]]
        config = self.config
        kept, selection = select(
            rows,
            config.rollouts.keep_per_problem,
            config.loss,
            config.optimization.batch_tokens,
        )
        # Older chunks have none: there such a prompt was an error.
        selection["skipped_prompts"] = sum(chunk.get("skipped_prompts", 0) for chunk in chunks)
        if not kept:
            reasons = ", ".join(
                f"{count} {reason}" for reason, count in selection["rejected"].items()
            )
            seen = "; ".join(list(selection["violations"])[:3])
            longer = selection["rejected"]["too long"]
            advice = "raise optimization.batch_tokens and resume, or " if longer else ""
            raise ConfigError(
                f"self-training kept none of {len(rows)} rollouts ({reasons}"
                f"{'; ' + seen if seen else ''}): they are all in {self.run_dir / 'rollouts'}; "
                f"{advice}in a new run_dir start from a model that is right more often, or raise "
                "rollouts.samples"
            )
        save_rows(kept, self.run_dir / "kept.jsonl")
        write_json(self.run_dir / "selection.json", selection)

    def _chunk(self, number: int) -> Row:
        """What its file holds."""
        record = read_json(self._chunk_file(number), "problems", "means", "rollouts")
        if record["problems"] != fingerprint(self.chunks[number]):
            raise ConfigError(
                f"task: {self.config.task.name} is not what {self._chunk_file(number)} was rolled "
                "out on; resume with the same problems or start another run"
            )
        return record

    def _chunk_file(self, number: int) -> Path:
        return self.run_dir / "rollouts" / f"chunk-{number}.json"

    def _engine(self, checkpoint: Path | None) -> Engine:
        """Of a checkpoint, or of the model that the run starts from."""
        config = self.config
        give_back_memory()
        model, tokenizer = build_model(config, checkpoint)
        to_device(model, self.device)
        return Engine(
            model.eval(),
            Codec.from_tokenizer(tokenizer, end_ids(model), config.template),
            **asdict(config.rollouts.engine),
            autocast=config.compute.precision == "bf16",
        )

    def _roll_out(
        self, engine: Engine, number: int, title: str, budget: int | None
    ) -> list[Graded]:
        """Of the problems of a chunk whose prompts fit the context and, if there is one, the budget
        of a trie."""
        rollouts = self.config.rollouts
        try:
            fit = fitting(engine, self.chunks[number], rollouts.generation, budget)
            problems = fit.problems
        except PromptTooLong:  # all of them
            problems = []
        total = len(problems) * rollouts.samples
        with SharedProgress(self.console, title, total, engine) as progress:
            return roll_out(
                engine,
                self.task,
                problems,
                rollouts.generation,
                samples=rollouts.samples,
                seed=(self.config.seed, number),
                on_progress=progress.decoded,
                on_graded=progress.graded,
            )

    def _lengths(self, graded: Graded, engine: Engine) -> Row:
        """What SFT, which writes an end token after the response, would have of it: whether all of
        it is in the context, and the tokens of its first call and of all, the prompt's included."""
        codec, max_depth = engine.codec, self.config.rollouts.generation.max_depth
        prompt = codec.encode_prompt(graded.problem.prompt)
        ids = [*prompt, *codec.encode(graded.response), codec.eos_id]
        first = extract_calls(ids, codec, len(prompt), max_depth=max_depth)[0]
        return {
            "fits": len(ids) <= engine.context_length,
            "first_call_tokens": len(first.path),
            "all_tokens": len(ids),
        }


def select(
    rows: Iterable[Row], keep_per_problem: int, loss: Loss, batch_tokens: int
) -> tuple[list[Row], Row]:
    """What is kept of graded rollouts, in the columns of threadweaver.data, and a report.

    A rollout is rejected for the first of these that holds: wrong, malformed, too long (the model's
    context ended it, and leaves no room for an end token; or SFT, with this loss and budget, could
    not train on its first call), duplicate (the same response to the same problem), over the cap
    (of its problem).
    """
    first_call = "all_tokens" if loss == "sequential" else "first_call_tokens"
    kept: list[Row] = []
    rejected = dict.fromkeys(("wrong", "malformed", "too long", "duplicate", "over the cap"), 0)
    breaches: Counter[str] = Counter()
    responses: dict[str, set[str]] = {}
    count = right = well_formed = 0
    for row in rows:
        question, response, answer = row["question"], row["response"], row["ground_truth"]
        count += 1
        right += row["correct"]
        well_formed += not row["violations"]
        breaches.update(re.sub(r"[0-9]+", "n", v.partition(": ")[2]) for v in row["violations"][:1])
        seen = responses.setdefault(json.dumps([question, answer]), set())
        if not row["correct"]:
            rejected["wrong"] += 1
        elif row["violations"]:
            rejected["malformed"] += 1
        elif not row.get("fits", True) or row.get(first_call, 0) > batch_tokens:
            # Older chunks have no counts, and "fits", if any, is also of the budget of then.
            rejected["too long"] += 1
        elif response in seen:
            rejected["duplicate"] += 1
        elif len(seen) == keep_per_problem:
            rejected["over the cap"] += 1
        else:
            seen.add(response)
            prompt = Rendered(question) if row.get("rendered") else question
            kept.append(trajectory_row(prompt, response, answer))
    report = {
        "rollouts": count,
        "kept": len(kept),
        "acceptance": len(kept) / max(count, 1),
        "right": right / max(count, 1),
        "well_formed": well_formed / max(count, 1),
        "rejected": rejected,
        "violations": dict(breaches.most_common(MOST_REASONS)),
    }
    return kept, report
