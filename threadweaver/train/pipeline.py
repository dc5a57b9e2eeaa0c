"""SFT, self-training and P-GRPO, one after another, evaluated after each.

    run_dir/data.jsonl          demonstrations, if SFT is on those
    run_dir/task.json           a fingerprint of the problems, if the task is a data file
    run_dir/sft, self_train, rl runs of their own
    run_dir/evaluation/         STAGE.json: held-out problems in both modes; STAGE-MODE.json: each
                                response
    run_dir/summary.json        what all stages came to; plots beside it

A stage whose summary.json is there is done, and skipped; one that was killed is resumed.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from threadweaver import ranks
from threadweaver.data import is_data_path, save_rows, trajectory_row
from threadweaver.device import resolve
from threadweaver.evaluate.grade import graded_row, summary
from threadweaver.evaluate.metrics import Evaluation
from threadweaver.evaluate.modes import evaluate_modes
from threadweaver.evaluate.rollouts import fingerprint, fitting
from threadweaver.generate.engine import Engine
from threadweaver.generate.load import load_engine
from threadweaver.generate.options import EngineSettings
from threadweaver.generate.settings import EngineSizes
from threadweaver.generate.weaver import Mode
from threadweaver.model import end_ids
from threadweaver.progress import print_line
from threadweaver.tasks import Problem, Split, load_task
from threadweaver.train.config import ConfigError, DataConfig, ModelConfig, TaskConfig
from threadweaver.train.plots import plot_rl, plot_stages
from threadweaver.train.report import print_pipeline_table
from threadweaver.train.rl import RLTrainer
from threadweaver.train.rollout_model import RolloutModel
from threadweaver.train.run import Run
from threadweaver.train.run_dir import (
    check_same_config,
    checkpoint_of,
    has_begun,
    read_json,
    write_json,
)
from threadweaver.train.self_train import SelfTraining
from threadweaver.train.setup import build_model
from threadweaver.train.sft import SFTTrainer
from threadweaver.train.stages import (
    EvaluationConfig,
    PipelineConfig,
    RLConfig,
    RLRollouts,
    SelfTrainConfig,
    SelfTrainRollouts,
    SFTConfig,
)
from threadweaver.trajectory import Codec

Stage = Literal["sft", "self_train", "rl"]


@contextmanager
def _of_stage(stage: Stage) -> Iterator[None]:
    """Settings that errors name get the name that they have in a pipeline."""
    try:
        yield
    except ConfigError as error:
        line = str(error)
        if stage == "sft":
            line = re.sub(r"^data\.train(?=[: ])", "data", line)
        # Not a path, such as data/run or data.run/sft.
        own = re.match(r"(data|loss|optimization|policy|reward|rollouts)(\.\w+)*[: ]", line)
        raise ConfigError(f"{stage}.{line}" if own else line) from error


class Pipeline(Run[PipelineConfig]):
    """One run of the pipeline, up to where it was stopped."""

    def is_finished(self) -> bool:
        """Never: a pipeline whose stages are finished shows its table again."""
        return False

    def find_state(self) -> None:
        """Settings of a stage that has not begun may change; before the first begins, all may."""

        def check() -> None:
            if has_begun(self.run_dir / "sft"):
                later = [s for s in ("self_train", "rl") if not has_begun(self.run_dir / s)]
                check_same_config(self.config, later)

        ranks.on_first(check)

    def load(self) -> None:
        config = self.config
        self.task = load_task(config.task.name, **config.task.options)
        ranks.on_first(self._check_task)
        self.held_out = self._problems("evaluate", "validation", config.evaluate.problems)
        self.stages: list[Stage] = ["sft", "self_train", "rl"]
        if config.self_train.skip:
            self.stages.remove("self_train")
        self.part = self._prepare("sft", config.model, self._check_stages)
        if self.part is None and not all(self._is_done(stage) for stage in self.stages):
            model, tokenizer = build_model(config, self._checkpoint("sft"))
            torch.nn.Module.to(model, self.device)  # of whose memory the pools are a part
            codec = Codec.from_tokenizer(tokenizer, end_ids(model), config.template)
            self._check_stages_of(model, codec)

    def work(self) -> int:
        """See `Run`; also the exit code of the stage that was stopped."""
        if is_data_path(self.config.task.name):
            ranks.on_first(lambda: write_json(self._task_file, {"problems": self._fingerprint()}))
        checkpoint = None
        for stage in self.stages:
            if checkpoint is not None:  # the first stage was prepared by load
                self.part = self._prepare(
                    stage, replace(self.config.model, path=checkpoint, arch=None)
                )
            if self.part is not None:
                self.part.resume_command = self.resume_command
                with _of_stage(stage):
                    if code := self.part.run():
                        return code
                self.part = None  # what follows needs the memory
            checkpoint = str(self._checkpoint(stage))
            if not self._is_there(self._evaluation_file(stage)):
                self._evaluate(stage, checkpoint)
        ranks.on_first(self._finish)
        return 0

    def _problems(self, setting: str, split: Split, count: int | None) -> list[Problem]:
        """Problems of the task; ConfigError that names the setting if there are not so many."""
        try:
            return self.task.problems(split, count, self.config.seed)
        except ValueError as error:
            raise ConfigError(f"{setting}.problems: {error}") from error

    @property
    def _task_file(self) -> Path:
        return self.run_dir / "task.json"

    def _fingerprint(self) -> str:
        """Of all problems of the task, a data file."""
        return fingerprint(
            [*self.task.problems("train", None), *self.task.problems("validation", None)]
        )

    def _check_task(self) -> None:
        """Raises ConfigError if the problems are not those that the run began with; older versions
        did not write which."""
        path = self._task_file
        if not (path.exists() and has_begun(self.run_dir / "sft")):
            return
        if read_json(path, "problems")["problems"] != self._fingerprint():
            raise ConfigError(
                f"task: {self.config.task.name} is not what {self.run_dir} was begun with; resume "
                "with the same problems or start another run"
            )

    def _checkpoint(self, stage: Stage) -> Path:
        """That a finished stage ended with."""
        folder = self.run_dir / stage
        own = folder / "sft" if stage == "self_train" else folder
        return ranks.on_first(lambda: checkpoint_of(own))

    def _is_done(self, stage: Stage) -> bool:
        return self._is_there(self.run_dir / stage / "summary.json") and self._is_there(
            self._evaluation_file(stage)
        )

    def _is_there(self, path: Path) -> bool:
        return ranks.on_first(path.exists)

    def _check_stages(self, sft: SFTTrainer) -> None:
        model = RolloutModel(sft.model, sft.tokenizer, self.config.compute).model
        self._check_stages_of(model, sft.codec)

    def _check_stages_of(self, model: PreTrainedModel, codec: Codec) -> None:
        """Refuses what a later stage or an evaluation would refuse, and says which prompts will be
        skipped; leaves such out of the held-out problems."""
        config, own, rl = self.config, self.config.self_train, self.config.rl
        evaluate = config.evaluate
        self.held_out = self._fitting(
            "evaluate", model, codec, self.held_out, evaluate, evaluate.engine
        )
        for stage, stage_settings, count, setting in (
            ("self_train", own, own.problems or config.task.problems, own.problems),
            ("rl", rl, config.task.problems, None),
        ):
            if stage in self.stages and not self._is_there(self.run_dir / stage / "summary.json"):
                problems = self._problems(stage if setting else "task", "train", count)
                rollouts = stage_settings.rollouts
                budget = stage_settings.optimization.batch_tokens
                self._fitting(stage, model, codec, problems, rollouts, rollouts.engine, budget)

    def _fitting(
        self,
        name: str,
        model: PreTrainedModel,
        codec: Codec,
        problems: list[Problem],
        settings: EvaluationConfig | SelfTrainRollouts | RLRollouts,
        sizes: EngineSizes,
        budget: int | None = None,
    ) -> list[Problem]:
        section = name if budget is None else f"{name}.rollouts"
        try:
            half = resolve(self.config.compute.precision, self.device) == "bf16"
            engine = Engine(model, codec, **asdict(sizes), autocast=half)
            fit = fitting(engine, problems, settings.generation, budget)
        except ValueError as error:
            raise ConfigError(f"{section}: {error}") from error
        for note in fit.notes:
            print_line(self.console, f"{section}: {note}")
        return fit.problems

    def _prepare(
        self,
        stage: Stage,
        model: ModelConfig,
        check: Callable[[Any], None] = lambda run: None,
    ) -> Run[Any] | None:
        """The run of a stage; None if it is finished."""
        with _of_stage(stage):
            return self._prepared(stage, model, check)

    def _prepared(
        self, stage: Stage, model: ModelConfig, check: Callable[[Any], None]
    ) -> Run[Any] | None:
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
                train=sft.data or ranks.on_first(self._demonstrations),
                loss=sft.loss,
                max_depth=sft.max_depth,
            )
            settings = SFTConfig(data=data, optimization=sft.optimization, **shared)
            return SFTTrainer.prepare(settings, None, self.console, check)
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
        if path.exists() and has_begun(self.run_dir / "sft"):
            return str(path)
        stage, config = self.config.sft, self.config
        problems = self._problems("task", "train", config.task.problems)
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
        ranks.on_first(lambda: self._write_evaluation(stage, evaluations))

    def _write_evaluation(self, stage: Stage, evaluations: Mapping[Mode, Evaluation]) -> None:
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
        stages = {
            stage: read_json(self._evaluation_file(stage), "parallel", "sequential")
            for stage in self.stages
        }
        last = stages["rl"]
        total, longest = last["sequential"]["total_tokens"], last["parallel"]["longest_path_tokens"]
        result = {
            "stages": stages,
            "speedup": total / longest,
            "checkpoint": str(checkpoint_of(self.run_dir / "rl")),
        }
        print_pipeline_table(self.console, result, self.run_dir)
        write_json(self.run_dir / "summary.json", result)
        plot_stages(stages, self.run_dir / "stages.png")
        if (metrics := self.run_dir / "rl" / "metrics.jsonl").exists():
            plot_rl(metrics, self.run_dir / "rl.png")

    def _evaluation_file(self, stage: Stage) -> Path:
        return self.run_dir / "evaluation" / f"{stage}.json"
