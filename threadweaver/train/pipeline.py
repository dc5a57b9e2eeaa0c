"""SFT, self-training and P-GRPO, one after another, evaluated after each.

    run_dir/data.jsonl          demonstrations, if SFT is on those
    run_dir/sft, self_train, rl runs of their own
    run_dir/evaluation/         STAGE.json: held-out problems in both modes; STAGE-MODE.json: each
                                response
    run_dir/summary.json        what all stages came to; plots beside it

A stage whose summary.json is there is done, and skipped; one that was killed is resumed.
"""

from __future__ import annotations

import random
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from threadweaver.data import save_rows, trajectory_row
from threadweaver.evaluate.grade import graded_row, summary
from threadweaver.evaluate.modes import evaluate_modes
from threadweaver.generate.load import load_engine
from threadweaver.generate.options import EngineSettings
from threadweaver.tasks import load_task
from threadweaver.train.config import ConfigError, DataConfig, ModelConfig, TaskConfig
from threadweaver.train.plots import plot_rl, plot_stages
from threadweaver.train.report import print_pipeline_table
from threadweaver.train.rl import RLTrainer
from threadweaver.train.run import Run
from threadweaver.train.run_dir import holds_run, read_json, write_json
from threadweaver.train.self_train import SelfTraining
from threadweaver.train.sft import SFTTrainer
from threadweaver.train.stages import PipelineConfig, RLConfig, SelfTrainConfig, SFTConfig

Stage = Literal["sft", "self_train", "rl"]


class Pipeline(Run[PipelineConfig]):
    """One run of the pipeline, up to where it was stopped."""

    def is_finished(self) -> bool:
        """Never: a pipeline whose stages are finished shows its table again."""
        return False

    def load(self) -> None:
        config = self.config
        self.task = load_task(config.task.name, **config.task.options)
        self.held_out = self.task.problems("validation", config.evaluate.problems, config.seed)
        self.stages: list[Stage] = ["sft", "self_train", "rl"]
        if config.self_train.skip:
            self.stages.remove("self_train")
        self.part = self._prepare("sft", config.model)

    def work(self) -> int:
        """See `Run`; also the exit code of the stage that was stopped."""
        checkpoint = None
        for stage in self.stages:
            if checkpoint is not None:  # the first stage was prepared by load
                self.part = self._prepare(stage, ModelConfig(path=checkpoint))
            if self.part is not None and (code := self.part.run()):
                return code
            checkpoint = read_json(self.run_dir / stage / "summary.json")["checkpoint"]
            if not self._evaluation_file(stage).exists():
                self._evaluate(stage, checkpoint)
        self._finish()
        return 0

    def _prepare(self, stage: Stage, model: ModelConfig) -> Run[Any] | None:
        """The run of a stage; None if it is finished."""
        self.console.rule(f"{stage.replace('_', '-')}", align="left")
        config = self.config
        shared: dict[str, Any] = {
            "run_dir": str(self.run_dir / stage),
            "model": model,
            "template": config.template,
            "compute": config.compute,
            "report": config.report,
            "seed": config.seed,
        }
        if stage == "sft":
            sft = config.sft
            data = DataConfig(
                train=sft.data or self._demonstrations(), loss=sft.loss, max_depth=sft.max_depth
            )
            settings = SFTConfig(data=data, optimization=sft.optimization, **shared)
            return SFTTrainer.prepare(settings, None, self.console)
        if stage == "self_train":
            own = config.self_train
            settings = SelfTrainConfig(
                task=TaskConfig(
                    config.task.name, config.task.options, own.problems or config.task.problems
                ),
                loss=config.sft.loss,
                rollouts=own.rollouts,
                optimization=own.optimization,
                **shared,
            )
            return SelfTraining.prepare(settings, None, self.console)
        settings = RLConfig(task=config.task, evaluate=config.evaluate, **vars(config.rl), **shared)
        return RLTrainer.prepare(settings, None, self.console)

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
            rows.append(trajectory_row(problem.prompt, response, problem.answer))
        save_rows(rows, path)
        return str(path)

    def _evaluate(self, stage: Stage, checkpoint: str) -> None:
        """Held-out problems in both modes."""
        config = self.config
        settings = EngineSettings(
            **asdict(config.evaluate.engine),
            device=config.compute.device,
            precision=config.compute.precision,
        )
        engine, _ = load_engine(checkpoint, settings, parallel=True, template=config.template)
        evaluations = evaluate_modes(
            ("parallel", "sequential"),
            engine,
            self.task,
            self.held_out,
            config.evaluate.generation,
            self.console,
            seed=config.seed,
        )
        path = self._evaluation_file(stage)
        for mode, evaluation in evaluations.items():
            responses = [graded_row(g) for g in evaluation.graded]
            write_json(path.with_name(f"{stage}-{mode}.json"), responses, indent=None)
        result = {
            mode: {**summary(evaluation.graded), "detail": evaluation.as_dict()}
            for mode, evaluation in evaluations.items()
        }
        write_json(path, result)

    def _finish(self) -> None:
        stages = {stage: read_json(self._evaluation_file(stage)) for stage in self.stages}
        last = stages["rl"]
        total, longest = last["sequential"]["total_tokens"], last["parallel"]["longest_path_tokens"]
        result = {
            "stages": stages,
            "speedup": total / longest,
            "checkpoint": read_json(self.run_dir / "rl" / "summary.json")["checkpoint"],
        }
        write_json(self.run_dir / "summary.json", result)
        plot_stages(stages, self.run_dir / "stages.png")
        plot_rl(self.run_dir / "rl" / "metrics.jsonl", self.run_dir / "rl.png")
        print_pipeline_table(self.console, result, self.run_dir)

    def _evaluation_file(self, stage: Stage) -> Path:
        return self.run_dir / "evaluation" / f"{stage}.json"
