"""SFT, self-training and P-GRPO, one after another, evaluated after each.

    run_dir/data.jsonl          demonstrations, if SFT is on those
    run_dir/sft, self_train, rl runs of their own
    run_dir/evaluation/         STAGE.json: held-out problems in both modes; STAGE-MODE.json: each
                                response
    run_dir/summary.json        what all stages came to; plots beside it

A stage whose summary.json is there is done, and skipped; one that was killed is resumed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from rich.console import Console

from threadweaver.data import save_rows
from threadweaver.evaluate.grade import graded_row, summary
from threadweaver.evaluate.metrics import evaluate
from threadweaver.generate.load import load_engine
from threadweaver.generate.options import EngineSettings
from threadweaver.generate.weaver import Mode
from threadweaver.progress import ResponsesProgress
from threadweaver.tasks import load_task
from threadweaver.train.config import ConfigError, DataConfig, ModelConfig, SFTConfig
from threadweaver.train.plots import plot_rl, plot_stages
from threadweaver.train.report import print_pipeline_table
from threadweaver.train.rl import RLTrainer
from threadweaver.train.run_dir import (
    check_run_dir,
    check_same_config,
    holds_run,
    settle_precision,
    write_config,
    write_whole,
)
from threadweaver.train.self_train import SelfTraining
from threadweaver.train.setup import prepare_torch
from threadweaver.train.sft import SFTTrainer
from threadweaver.train.stages import PipelineConfig, RLConfig, SelfTrainConfig, TaskConfig

Stage = Literal["sft", "self_train", "rl"]
MODES: tuple[Mode, ...] = ("parallel", "sequential")


class Run(Protocol):
    """One stage, ready to go. Returns an exit code."""

    def run(self) -> int: ...


class Pipeline:
    """One run of the pipeline, up to where it was stopped.

    Raises:
        ValueError: settings that cannot be used.
    """

    def __init__(self, config: PipelineConfig, precision_note: str | None, console: Console):
        self.config = config
        self.precision_note = precision_note
        self.console = console
        self.run_dir = Path(config.run_dir)
        self.task = load_task(config.task.name, **config.task.options)
        self.held_out = self.task.problems("validation", config.evaluate.problems, config.seed)

    @classmethod
    def prepare(cls, config: PipelineConfig, resume: bool, console: Console) -> Pipeline:
        check_run_dir(Path(config.run_dir), resume)
        precision_note = settle_precision(config, console)
        check_same_config(config)
        return cls(config, precision_note, console)

    def run(self) -> int:
        """To the end. Returns the exit code: 0, or that of the stage that was stopped."""
        model = self.config.model
        for stage, prepare in self._stages():
            self.console.rule(f"{stage.replace('_', '-')}", align="left")
            run = prepare(model)
            # From here on the folder holds a run: what its first stage needs is known to be good.
            write_config(self.config, self.precision_note)
            if run is not None and (code := run.run()):
                return code
            model = ModelConfig(path=self._summary_of(stage)["checkpoint"])
            self._evaluate(stage)
        self._finish()
        return 0

    def _stages(self) -> list[tuple[Stage, Callable[[ModelConfig], Run | None]]]:
        stages: list[tuple[Stage, Callable[[ModelConfig], Run | None]]] = [("sft", self._sft)]
        if not self.config.self_train.skip:
            stages.append(("self_train", self._self_train))
        return [*stages, ("rl", self._rl)]

    def _sft(self, model: ModelConfig) -> Run | None:
        config, stage = self.config, self.config.sft
        folder = self.run_dir / "sft"
        settings = SFTConfig(
            run_dir=str(folder),
            data=DataConfig(train=stage.data or self._demonstrations(), loss=stage.loss),
            model=model,
            optimization=stage.optimization,
            compute=config.compute,
            report=config.report,
            seed=config.seed,
        )
        return SFTTrainer.prepare(settings, holds_run(folder), self.console)

    def _self_train(self, model: ModelConfig) -> Run | None:
        config, stage = self.config, self.config.self_train
        folder = self.run_dir / "self_train"
        settings = SelfTrainConfig(
            run_dir=str(folder),
            model=model,
            task=TaskConfig(
                config.task.name, config.task.options, stage.problems or config.task.problems
            ),
            loss=config.sft.loss,
            rollouts=stage.rollouts,
            optimization=stage.optimization,
            compute=config.compute,
            report=config.report,
            seed=config.seed,
        )
        return SelfTraining.prepare(settings, holds_run(folder), self.console)

    def _rl(self, model: ModelConfig) -> Run | None:
        config = self.config
        folder = self.run_dir / "rl"
        settings = RLConfig(
            run_dir=str(folder),
            model=model,
            task=config.task,
            **vars(config.rl),
            compute=config.compute,
            report=config.report,
            seed=config.seed,
        )
        return RLTrainer.prepare(settings, holds_run(folder), self.console)

    def _demonstrations(self) -> str:
        """The file of demonstrations, written if this run has not done so."""
        path = self.run_dir / "data.jsonl"
        if path.exists() and holds_run(self.run_dir):
            return str(path)
        stage, config = self.config.sft, self.config
        problems = self.task.problems("train", config.task.problems, config.seed)
        if len(problems) < stage.demonstrations:
            raise ConfigError(
                f"sft.demonstrations is {stage.demonstrations}: there are {len(problems)} training "
                "problems"
            )
        problems = problems[: stage.demonstrations]
        count = round(stage.parallel_share * len(problems))
        in_parallel = set(random.Random(f"{config.seed}").sample(range(len(problems)), count))
        rows = []
        for i, problem in enumerate(problems):
            response = self.task.demonstration(problem, i in in_parallel)
            if response is None:
                raise ConfigError(
                    f"sft.data: {config.task.name} has no demonstrations; name a file of "
                    "trajectories"
                )
            rows.append(
                {
                    "question": problem.prompt,
                    "response": response,
                    "qwen_text": problem.prompt + response,
                    "reward_model": {"ground_truth": problem.answer, "style": "rule"},
                }
            )
        save_rows(rows, path)
        return str(path)

    def _evaluate(self, stage: Stage) -> None:
        """Held-out problems in both modes, unless that was done."""
        path = self._evaluation_file(stage)
        if path.exists():
            return
        config = self.config
        prepare_torch(config, None)
        settings = EngineSettings(
            **asdict(config.evaluate.engine),
            device=config.compute.device,
            precision=config.compute.precision,
        )
        engine, _ = load_engine(self._summary_of(stage)["checkpoint"], settings, parallel=True)
        result = {}
        for mode in MODES:
            title = f"evaluating, {mode} mode"
            with ResponsesProgress(self.console, title, len(self.held_out), engine) as progress:
                evaluation = evaluate(
                    engine,
                    self.task,
                    self.held_out,
                    replace(config.evaluate.generation, mode=mode),
                    seed=config.seed,
                    on_progress=progress.decoded,
                    on_graded=progress.graded,
                )
            result[mode] = {**summary(evaluation.graded), "detail": evaluation.as_dict()}
            responses = [graded_row(g) for g in evaluation.graded]
            path.parent.mkdir(exist_ok=True)
            write_whole(path.with_name(f"{stage}-{mode}.json"), json.dumps(responses) + "\n")
        write_whole(path, json.dumps(result, indent=2) + "\n")

    def _finish(self) -> None:
        stages = {
            stage: json.loads(self._evaluation_file(stage).read_text(encoding="utf-8"))
            for stage, _ in self._stages()
        }
        last = stages["rl"]
        total, longest = last["sequential"]["total_tokens"], last["parallel"]["longest_path_tokens"]
        result: dict[str, Any] = {
            "stages": stages,
            "speedup": total / longest,
            "checkpoint": self._summary_of("rl")["checkpoint"],
        }
        write_whole(self.run_dir / "summary.json", json.dumps(result, indent=2) + "\n")
        plot_stages(stages, self.run_dir / "stages.png")
        plot_rl(self.run_dir / "rl" / "metrics.jsonl", self.run_dir / "rl.png")
        print_pipeline_table(self.console, result, self.run_dir)

    def _summary_of(self, stage: Stage) -> dict[str, Any]:
        return json.loads((self.run_dir / stage / "summary.json").read_text(encoding="utf-8"))

    def _evaluation_file(self, stage: Stage) -> Path:
        return self.run_dir / "evaluation" / f"{stage}.json"
