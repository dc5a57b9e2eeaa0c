"""Settings of each kind of run: SFT, self-training, P-GRPO, and the pipeline of all three.

As in config.py; the defaults are the published ones. Of several bases RunConfig comes first:
jsonargparse resolves annotations by the module of the first.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from threadweaver.evaluate.reward import RewardConfig
from threadweaver.generate.sampler import SamplingParams
from threadweaver.generate.settings import MOST_RESPONSES, EngineSizes, GenerationSettings
from threadweaver.train.config import (
    AdamWConfig,
    ConfigError,
    DataConfig,
    OptimizationConfig,
    RunConfig,
    TaskConfig,
    check_least,
    check_names,
)
from threadweaver.train.policy_loss import PolicyConfig
from threadweaver.trajectory.loss import Loss


@dataclass
class EvaluationConfig:
    """Held-out problems, in parallel and in sequential mode.

    Args:
        problems: how many.
        generation: limits and sampling; the mode is both.
        engine: its sizes.
    """

    problems: int = 200
    generation: GenerationSettings = field(
        default_factory=lambda: GenerationSettings(
            sampling=SamplingParams(temperature=0.6, top_p=0.95)
        )
    )
    engine: EngineSizes = field(default_factory=EngineSizes)

    def __post_init__(self):
        check_least(1, "evaluate", self, "problems")


@dataclass
class SFTEvaluation(EvaluationConfig):
    """Problems of a file or task, solved with the trained model at the end, in both modes.

    Args:
        data: file of prompts and right answers, of which the first rows are taken, or the name of a
            task, whose held-out problems are; none: no evaluation.
        options: of that task or file, by name, as task.options.
        generation: limits and sampling; by default the likeliest tokens.
        max_new_tokens: another name of generation.max_tokens, which it overrides.
        batch_size: another name of engine.max_sequences, which it overrides.
        kv_gigabytes: another name of engine.kv_gigabytes, which it overrides.
    """

    data: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    generation: GenerationSettings = field(
        default_factory=lambda: GenerationSettings(
            max_tokens=1024, sampling=SamplingParams(temperature=0)
        )
    )
    max_new_tokens: int | None = None
    batch_size: int | None = None
    kv_gigabytes: float | None = None

    def __post_init__(self):
        super().__post_init__()
        check_least(1, "evaluate", self, "max_new_tokens", "batch_size")
        check_names("evaluate.options", self.options)
        # Cleared, so that in a resumed run the settings themselves can be changed.
        if self.max_new_tokens is not None:
            self.generation = replace(self.generation, max_tokens=self.max_new_tokens)
            self.max_new_tokens = None
        if self.batch_size is not None:
            self.engine = replace(self.engine, max_sequences=self.batch_size)
            self.batch_size = None
        if self.kv_gigabytes is not None:
            self.engine = replace(self.engine, kv_gigabytes=self.kv_gigabytes)
            self.kv_gigabytes = None


@dataclass(kw_only=True)
class SFTConfig(RunConfig):
    """Supervised fine-tuning on finished trajectories.

    Args:
        run_dir: folder of this run: config.yaml, metrics.jsonl, summary.json, TensorBoard events,
            checkpoints.
        seed: of a new model's weights and of the order of the data.
    """

    command: ClassVar[str] = "sft"
    # Of the data, its content counts.
    free_on_resume: ClassVar[tuple[str, ...]] = (
        *RunConfig.free_on_resume,
        "data.train",
        "data.validation",
    )

    data: DataConfig
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    evaluate: SFTEvaluation = field(default_factory=SFTEvaluation)


def _check_responses(name: str, problems: int, samples: int) -> None:
    if problems * samples > MOST_RESPONSES:
        raise ConfigError(
            f"{name} is {problems}: times {samples} samples are {problems * samples:,} responses "
            f"at once; at most {MOST_RESPONSES:,} can be decoded together"
        )


@dataclass
class SelfTrainRollouts:
    """What self-training samples, and what it keeps.

    Args:
        samples: responses to each training problem.
        keep_per_problem: most responses kept of one problem.
        chunk: problems that are rolled out together; what a killed run loses at most.
        generation: mode, limits, sampling.
        engine: its sizes.
    """

    samples: int = 1
    keep_per_problem: int = 1
    chunk: int = 256
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    engine: EngineSizes = field(default_factory=EngineSizes)

    def __post_init__(self):
        check_least(1, "rollouts", self, "samples", "keep_per_problem", "chunk")
        _check_responses("rollouts.chunk", self.chunk, self.samples)


@dataclass
class SelfTrainSettings:
    """What self-training samples, and how it trains on what it keeps."""

    rollouts: SelfTrainRollouts = field(default_factory=SelfTrainRollouts)
    optimization: OptimizationConfig = field(default_factory=lambda: OptimizationConfig(epochs=1))


@dataclass(kw_only=True)
class SelfTrainConfig(RunConfig, SelfTrainSettings):
    """Self-training: the model's own right and well-formed rollouts, and SFT on them.

    Args:
        run_dir: folder of this run: rollouts/, kept.jsonl, sft/ (a run of its own), summary.json.
        model: where it starts.
        loss: as data.loss of SFT.
        seed: of the problems, the draws and the order of the data.
    """

    command: ClassVar[str] = "self-train"
    free_on_resume: ClassVar[tuple[str, ...]] = (*RunConfig.free_on_resume, "rollouts.engine")

    task: TaskConfig = field(default_factory=TaskConfig)
    loss: Loss = "response"


@dataclass
class RLRollouts:
    """What a batch of P-GRPO is.

    Args:
        problems: in a batch.
        samples: responses to each of them; they are each other's baseline.
        refill: replace groups whose rewards are all equal, which have no signal, by those of
            further problems.
        refill_limit: with it, most problems sampled for a batch, in batches.
        generation: mode, limits, sampling.
        engine: its sizes.
    """

    problems: int = 128
    samples: int = 8
    refill: bool = False
    refill_limit: int = 3
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    engine: EngineSizes = field(default_factory=EngineSizes)

    def __post_init__(self):
        check_least(1, "rollouts", self, "problems", "refill_limit")
        if self.samples < 2:
            raise ConfigError(
                f"rollouts.samples is {self.samples}: it must be at least 2, since a response is "
                "measured against others to the same prompt"
            )
        _check_responses("rollouts.problems", self.problems, self.samples)


@dataclass
class RLOptimizationConfig(AdamWConfig):
    """AdamW at a constant rate after the warm-up.

    Args:
        steps: batches of rollouts.
        updates: optimizer steps to a batch; more than one clips the ratio to the sampling policy.
    """

    learning_rate: float = 1e-6
    warmup: float = 0.0
    steps: int = 350
    updates: int = 1

    def __post_init__(self):
        super().__post_init__()
        check_least(1, "optimization", self, "steps", "updates")


@dataclass
class RLSettings:
    """What P-GRPO samples, what it rewards, and how it trains."""

    rollouts: RLRollouts = field(default_factory=RLRollouts)
    reward: RewardConfig = field(default_factory=RewardConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    optimization: RLOptimizationConfig = field(default_factory=RLOptimizationConfig)

    def __post_init__(self):
        updates, problems = self.optimization.updates, self.rollouts.problems
        if updates > problems:
            raise ConfigError(
                f"optimization.updates is {updates}: it must be at most rollouts.problems, "
                f"{problems}, since the responses to a problem stay together in one of them"
            )


@dataclass(kw_only=True)
class RLConfig(RunConfig, RLSettings):
    """P-GRPO: reinforcement learning of parallel reasoning.

    Args:
        run_dir: folder of this run: config.yaml, metrics.jsonl, summary.json, TensorBoard events,
            checkpoints.
        model: where it starts; also the reference of policy.kl.
        evaluate: held-out problems for report.validate_every.
        seed: of the problems' order and of the draws.
    """

    command: ClassVar[str] = "rl"
    free_on_resume: ClassVar[tuple[str, ...]] = (*RunConfig.free_on_resume, "rollouts.engine")

    task: TaskConfig = field(default_factory=TaskConfig)
    evaluate: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self):
        super().__post_init__()
        RLSettings.__post_init__(self)


@dataclass
class SFTStage:
    """The first stage of a pipeline: SFT on demonstrations of the task, or on a data file.

    Args:
        data: file of trajectories; default: demonstrations.
        demonstrations: how many.
        parallel_share: share of them with blocks.
        max_depth: how deep the blocks of trajectories nest.
    """

    data: str | None = None
    demonstrations: int = 1000
    parallel_share: float = 1.0
    loss: Loss = "response"
    max_depth: int = 1
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)

    def __post_init__(self):
        check_least(1, "sft", self, "demonstrations", "max_depth")
        if not 0 <= self.parallel_share <= 1:
            raise ConfigError(
                f"sft.parallel_share is {self.parallel_share}: it must be between 0 and 1"
            )


@dataclass
class SelfTrainStage(SelfTrainSettings):
    """The second stage of a pipeline.

    Args:
        skip: leave the stage out.
        problems: how many training problems it rolls out; default: all of the task's.
    """

    skip: bool = False
    problems: int | None = None

    def __post_init__(self):
        check_least(1, "self_train", self, "problems")


@dataclass(kw_only=True)
class PipelineConfig(RunConfig):
    """SFT, self-training and P-GRPO, one after another, evaluated after each.

    Args:
        run_dir: folder of this run: sft/, self_train/ and rl/ (runs of their own), evaluation/,
            summary.json, plots.
        model: where it starts.
        seed: of all stages.
    """

    command: ClassVar[str] = "pipeline"
    free_on_resume: ClassVar[tuple[str, ...]] = (
        *RunConfig.free_on_resume,
        "self_train.rollouts.engine",
        "rl.rollouts.engine",
    )

    task: TaskConfig = field(default_factory=TaskConfig)
    sft: SFTStage = field(default_factory=SFTStage)
    self_train: SelfTrainStage = field(default_factory=SelfTrainStage)
    rl: RLSettings = field(default_factory=RLSettings)
    evaluate: EvaluationConfig = field(default_factory=EvaluationConfig)
