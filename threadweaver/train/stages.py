"""Settings of the stages that roll out: self-training, P-GRPO, and the pipeline of all three.

As in config.py; defaults are the published ones (SPEC, "Stages and published defaults").
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from threadweaver.evaluate.reward import RewardConfig
from threadweaver.generate.sampler import SamplingParams
from threadweaver.generate.settings import EngineSizes, GenerationSettings
from threadweaver.train.config import (
    AdamWConfig,
    ComputeConfig,
    ConfigError,
    ModelConfig,
    OptimizationConfig,
    ReportConfig,
    check_at_least_one,
)
from threadweaver.train.policy_loss import PolicyConfig
from threadweaver.trajectory.loss import Loss


@dataclass
class TaskConfig:
    """Where prompts come from and what grades the answers (threadweaver.tasks).

    Args:
        name: multiplication, reasoning_gym:<dataset>, or the path of a data file.
        options: of that task, by name.
        problems: how many training problems are drawn; default: all there are.
    """

    name: str = "multiplication"
    options: dict[str, Any] = field(default_factory=dict)
    problems: int | None = None


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
        _at_least(self, "rollouts", 1, "samples", "keep_per_problem", "chunk")


@dataclass
class SelfTrainSettings:
    """What self-training samples, and how it trains on what it keeps."""

    rollouts: SelfTrainRollouts = field(default_factory=SelfTrainRollouts)
    optimization: OptimizationConfig = field(default_factory=lambda: OptimizationConfig(epochs=1))


@dataclass(kw_only=True)
class SelfTrainConfig(SelfTrainSettings):
    """Self-training: the model's own right and well-formed rollouts, and SFT on them.

    Args:
        run_dir: folder of this run: rollouts/, kept.jsonl, sft/ (a run of its own), summary.json.
        model: where it starts.
        loss: as data.loss of SFT.
        seed: of the problems, the draws and the order of the data.
    """

    command: ClassVar[str] = "self-train"
    free_on_resume: ClassVar[tuple[str, ...]] = ()

    run_dir: str
    model: ModelConfig
    task: TaskConfig = field(default_factory=TaskConfig)
    loss: Loss = "response"
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    seed: int = 0

    def __post_init__(self):
        self.model.check()
        check_at_least_one(self)


@dataclass
class RLRollouts:
    """What a batch of P-GRPO is.

    Args:
        problems: in a batch.
        samples: responses to each of them; they are each other's baseline.
        generation: mode, limits, sampling.
        engine: its sizes.
    """

    problems: int = 128
    samples: int = 8
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    engine: EngineSizes = field(default_factory=EngineSizes)

    def __post_init__(self):
        _at_least(self, "rollouts", 1, "problems")
        if self.samples < 2:
            raise ConfigError(
                f"rollouts.samples is {self.samples}: it must be at least 2, since a response is "
                "measured against others to the same prompt"
            )


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
        _at_least(self, "optimization", 1, "steps", "updates")


@dataclass
class RLSettings:
    """What P-GRPO samples, what it rewards, and how it trains."""

    rollouts: RLRollouts = field(default_factory=RLRollouts)
    reward: RewardConfig = field(default_factory=RewardConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    optimization: RLOptimizationConfig = field(default_factory=RLOptimizationConfig)


@dataclass(kw_only=True)
class RLConfig(RLSettings):
    """P-GRPO: reinforcement learning of parallel reasoning.

    Args:
        run_dir: folder of this run: config.yaml, metrics.jsonl, summary.json, TensorBoard events,
            checkpoints.
        model: where it starts; also the reference of policy.kl.
        seed: of the problems' order and of the draws.
    """

    command: ClassVar[str] = "rl"
    free_on_resume: ClassVar[tuple[str, ...]] = ()

    run_dir: str
    model: ModelConfig
    task: TaskConfig = field(default_factory=TaskConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    seed: int = 0

    def __post_init__(self):
        self.model.check()
        check_at_least_one(self)

    @property
    def trains_on(self) -> str:
        return f"task: {self.task.name}"


@dataclass
class SFTStage:
    """The first stage of a pipeline: SFT on demonstrations of the task, or on a data file.

    Args:
        data: file of trajectories; default: demonstrations.
        demonstrations: how many.
        parallel_share: share of them with blocks.
    """

    data: str | None = None
    demonstrations: int = 1000
    parallel_share: float = 1.0
    loss: Loss = "response"
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)

    def __post_init__(self):
        _at_least(self, "sft", 1, "demonstrations")
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


@dataclass
class EvaluationConfig:
    """Held-out problems after each stage, in parallel and in sequential mode.

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


@dataclass
class PipelineConfig:
    """SFT, self-training and P-GRPO, one after another, evaluated after each.

    Args:
        run_dir: folder of this run: sft/, self_train/ and rl/ (runs of their own), evaluation/,
            summary.json, plots.
        model: where it starts.
        seed: of all stages.
    """

    command: ClassVar[str] = "pipeline"
    free_on_resume: ClassVar[tuple[str, ...]] = ()

    run_dir: str
    model: ModelConfig
    task: TaskConfig = field(default_factory=TaskConfig)
    sft: SFTStage = field(default_factory=SFTStage)
    self_train: SelfTrainStage = field(default_factory=SelfTrainStage)
    rl: RLSettings = field(default_factory=RLSettings)
    evaluate: EvaluationConfig = field(default_factory=EvaluationConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    seed: int = 0

    def __post_init__(self):
        self.model.check()
        check_at_least_one(self)


def _at_least(config: Any, section: str, least: int, *names: str) -> None:
    for name in names:
        if getattr(config, name) < least:
            raise ConfigError(
                f"{section}.{name} is {getattr(config, name)}: it must be at least {least}"
            )
