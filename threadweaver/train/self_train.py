"""Self-training: roll out, keep what is right and well formed, fine-tune on it (SPEC, "Stages").

    run_dir/rollouts/chunk-N.json   every rollout of a chunk of problems, graded, and their means
    run_dir/kept.jsonl              what was kept, as SFT reads it
    run_dir/selection.json          how many were kept, and why the others were not
    run_dir/sft/                    the run of SFT on it
    run_dir/summary.json            all of it; the first chunk's problems before and after

A killed run loses at most the chunk it was in: chunks are rolled out one after another, each by
itself, so a resumed run gets the same rollouts.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from threadweaver.data import save_rows
from threadweaver.evaluate.grade import Graded, graded_row, summary
from threadweaver.evaluate.rollouts import fingerprint, roll_out
from threadweaver.generate.engine import Engine
from threadweaver.progress import ResponsesProgress
from threadweaver.tasks import Problem, load_task
from threadweaver.train.config import ConfigError, DataConfig, ModelConfig, SFTConfig
from threadweaver.train.report import print_self_train_table
from threadweaver.train.run_dir import (
    check_run_dir,
    check_same_config,
    holds_run,
    settle_precision,
    write_config,
    write_whole,
)
from threadweaver.train.setup import build_model, prepare_torch
from threadweaver.train.sft import SFTTrainer
from threadweaver.train.stages import SelfTrainConfig
from threadweaver.trajectory import Codec

MOST_REASONS = 10
Row = dict[str, Any]


class SelfTraining:
    """One run of self-training, up to where it was stopped.

    Raises:
        ValueError: settings that cannot be used.
    """

    def __init__(self, config: SelfTrainConfig, console: Console):
        self.config = config
        self.console = console
        self.run_dir = Path(config.run_dir)
        self.task = load_task(config.task.name, **config.task.options)
        self.problems = self.task.problems("train", config.task.problems, config.seed)

    @classmethod
    def prepare(
        cls, config: SelfTrainConfig, resume: bool, console: Console
    ) -> SelfTraining | None:
        """None if the run is finished."""
        run_dir = Path(config.run_dir)
        check_run_dir(run_dir, resume)
        if (run_dir / "summary.json").exists():
            summary = run_dir / "summary.json"
            console.print(f"{run_dir}: this run is finished, see {summary}", soft_wrap=True)
            return None
        precision_note = settle_precision(config, console)
        check_same_config(config)
        run = cls(config, console)
        write_config(config, precision_note)
        return run

    def run(self) -> int:
        """To the end. Returns the exit code: 0, or 128 + the signal that stopped SFT.

        Raises:
            ConfigError: nothing was kept; says why.
        """
        if not (self.run_dir / "selection.json").exists():
            self._select()
        folder = self.run_dir / "sft"
        trainer = SFTTrainer.prepare(self._sft_config(folder), holds_run(folder), self.console)
        if trainer is not None and (code := trainer.run()):
            return code
        checkpoint = _read(folder / "summary.json")["checkpoint"]
        engine = self._engine(ModelConfig(path=checkpoint))
        result = {
            **_read(self.run_dir / "selection.json"),
            "before": _read(self._chunk_file(0))["means"],
            "after": summary(self._roll_out(engine, 0, self._chunks()[0], "rolling out after SFT")),
            "checkpoint": checkpoint,
        }
        write_whole(self.run_dir / "summary.json", json.dumps(result, indent=2) + "\n")
        print_self_train_table(self.console, result)
        return 0

    def _select(self) -> None:
        """Rolls out what is missing, and writes what is kept."""
        chunks = self._chunks()
        missing = [n for n in range(len(chunks)) if not self._chunk_file(n).exists()]
        engine = self._engine(self.config.model) if missing else None
        for n in missing:
            assert engine is not None
            graded = self._roll_out(engine, n, chunks[n], f"rolling out {n + 1}/{len(chunks)}")
            record = {
                "problems": fingerprint(chunks[n]),
                "means": summary(graded),
                "rollouts": [graded_row(g) for g in graded],
            }
            write_whole(self._chunk_file(n), json.dumps(record) + "\n")
        rows = [row for n, chunk in enumerate(chunks) for row in self._rows(n, chunk)]
        kept, selection = select(rows, self.config.rollouts.keep_per_problem)
        if not kept:
            reasons = ", ".join(
                f"{count} {reason}" for reason, count in selection["rejected"].items()
            )
            seen = "; ".join(list(selection["violations"])[:3])
            raise ConfigError(
                f"self-training kept none of {len(rows)} rollouts ({reasons}"
                f"{'; ' + seen if seen else ''}): start from a model that is right more often, or "
                f"raise rollouts.samples; they are all in {self.run_dir / 'rollouts'}"
            )
        save_rows(kept, self.run_dir / "kept.jsonl")
        write_whole(self.run_dir / "selection.json", json.dumps(selection, indent=2) + "\n")

    def _chunks(self) -> list[list[Problem]]:
        size = self.config.rollouts.chunk
        return [self.problems[i : i + size] for i in range(0, len(self.problems), size)]

    def _rows(self, n: int, problems: list[Problem]) -> list[Row]:
        record = _read(self._chunk_file(n))
        if record["problems"] != fingerprint(problems):
            raise ConfigError(
                f"task: {self.config.task.name} is not what {self._chunk_file(n)} was rolled out "
                "on; resume with the same problems or start another run"
            )
        return record["rollouts"]

    def _chunk_file(self, n: int) -> Path:
        return self.run_dir / "rollouts" / f"chunk-{n}.json"

    def _engine(self, source: ModelConfig) -> Engine:
        config = self.config
        device = prepare_torch(config, None)
        model, tokenizer = build_model(config, Path(source.path) if source.path else None)
        torch.nn.Module.to(model, device)
        return Engine(
            model.eval(),
            Codec.from_tokenizer(tokenizer),
            **asdict(config.rollouts.engine),
            autocast=config.compute.precision == "bf16",
        )

    def _roll_out(
        self, engine: Engine, number: int, problems: list[Problem], title: str
    ) -> list[Graded]:
        rollouts = self.config.rollouts
        total = len(problems) * rollouts.samples
        with ResponsesProgress(self.console, title, total, engine) as progress:
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

    def _sft_config(self, folder: Path) -> SFTConfig:
        config = self.config
        return SFTConfig(
            run_dir=str(folder),
            data=DataConfig(train=str(self.run_dir / "kept.jsonl"), loss=config.loss),
            model=config.model,
            optimization=config.optimization,
            compute=config.compute,
            report=config.report,
            seed=config.seed,
        )


def select(rows: Iterable[Row], keep_per_problem: int) -> tuple[list[Row], Row]:
    """What is kept of graded rollouts, in the columns of threadweaver.data, and a report.

    A rollout is rejected for the first of these that holds: wrong, malformed, duplicate (the same
    response to the same problem), over the cap (of its problem).
    """
    kept: list[Row] = []
    rejected = dict.fromkeys(("wrong", "malformed", "duplicate", "over the cap"), 0)
    breaches: Counter[str] = Counter()
    responses: dict[tuple[str, str], set[str]] = {}
    count = right = well_formed = 0
    for row in rows:
        count += 1
        right += row["correct"]
        well_formed += not row["violations"]
        breaches.update(re.sub(r"[0-9]+", "n", v.partition(": ")[2]) for v in row["violations"][:1])
        seen = responses.setdefault((row["question"], row["ground_truth"]), set())
        if not row["correct"]:
            rejected["wrong"] += 1
        elif row["violations"]:
            rejected["malformed"] += 1
        elif row["response"] in seen:
            rejected["duplicate"] += 1
        elif len(seen) == keep_per_problem:
            rejected["over the cap"] += 1
        else:
            seen.add(row["response"])
            kept.append(
                {
                    "question": row["question"],
                    "response": row["response"],
                    "qwen_text": row["question"] + row["response"],
                    "reward_model": {"ground_truth": row["ground_truth"], "style": "rule"},
                }
            )
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


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
