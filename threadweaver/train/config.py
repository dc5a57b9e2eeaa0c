"""Settings of a training run: their names, their defaults, and which values they may have.

Every field is a command-line option of the same name (`--optimization.learning_rate 3e-4`) and a
key of the YAML file given as `--config`; options win. Defaults are the published ones (SPEC,
"Stages and published defaults").
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any, ClassVar, Literal, Protocol, TypeVar, cast

from jsonargparse import ArgumentParser, Namespace

from threadweaver.trajectory.loss import Loss

T = TypeVar("T")


class ConfigError(ValueError):
    """A setting that cannot be used; the message names the field and says what to do."""


@dataclass
class ModelConfig:
    """What is trained. Exactly one of `path` and `arch`.

    Args:
        path: Hugging Face folder (config, safetensors, tokenizer), .gguf file, or smollm2. Tags
            that its tokenizer lacks are added.
        arch: fields of a Hugging Face config (`model_type`, `hidden_size`, ...) of a new model,
            initialised from the seed; it gets ThreadWeaver's own small tokenizer.
    """

    path: str | None = None
    arch: dict[str, Any] | None = None

    def check(self) -> None:
        """Raises ConfigError unless exactly one is set."""
        if (self.path is None) == (self.arch is None):
            raise ConfigError(
                "model.path, model.arch: set exactly one: path for a model on disk, arch for a new "
                "one"
            )


@dataclass
class DataConfig:
    """What it is trained on.

    Args:
        train: JSON lines or parquet file of trajectories.
        validation: a file like it, for the validation loss.
        loss: response: every response token but forced headers; completions: only what the model
            itself would sample (SPEC, "Calls, tries, loss").
        malformed: what to do with a trajectory that breaks the format: error, or drop and count.
    """

    train: str
    validation: str | None = None
    loss: Loss = "response"
    malformed: Literal["error", "drop"] = "error"


@dataclass
class AdamWConfig:
    """AdamW, and how much is computed at once.

    Args:
        batch_tokens: most tokens of a trie, and of the pack of tries of one micro-batch.
        learning_rate: its peak, at the end of the warm-up.
        betas: decay rates of the two moments.
        weight_decay: on matrices (embeddings too) and not on norms and biases.
        warmup: share of all steps in which the learning rate climbs.
        gradient_clip: largest norm of the gradient.
    """

    batch_tokens: int = 40960
    learning_rate: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 1e-4
    warmup: float = 0.05
    gradient_clip: float = 1.0

    def __post_init__(self):
        for name, valid, rule in (
            ("batch_tokens", self.batch_tokens >= 1, "at least 1"),
            ("learning_rate", self.learning_rate > 0, "above 0"),
            ("betas", all(0 <= beta < 1 for beta in self.betas), "in [0, 1)"),
            ("weight_decay", self.weight_decay >= 0, "at least 0"),
            ("warmup", 0 <= self.warmup <= 1, "between 0 and 1"),
            ("gradient_clip", self.gradient_clip > 0, "above 0"),
        ):
            if not valid:
                raise ConfigError(
                    f"optimization.{name} is {getattr(self, name)}: it must be {rule}"
                )


@dataclass
class OptimizationConfig(AdamWConfig):
    """How it is trained: AdamW, linear warm-up, cosine decay to zero.

    Args:
        epochs: passes over the training data.
        max_steps: number of optimizer steps, however many epochs that takes; overrides epochs.
        accumulation: micro-batches in a step.
    """

    epochs: int = 8
    max_steps: int | None = None
    accumulation: int = 1


@dataclass
class ComputeConfig:
    """What it is trained with.

    Args:
        device: auto takes the GPU if there is one.
        precision: bf16: bfloat16 autocast over float32 weights; fp32: everything in float32; auto:
            bf16 where the device multiplies bfloat16 itself, else fp32. A run keeps what it started
            with: config.yaml and checkpoints hold it, and why.
        gradient_checkpointing: recompute activations in the backward pass instead of keeping them.
        compile: run the model through torch.compile.
        threads: CPU threads of PyTorch; default: as many as PyTorch takes, or, in a resumed run, as
            many as before.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    gradient_checkpointing: bool = False
    compile: bool = False
    threads: int | None = None


@dataclass
class ReportConfig:
    """How often something is shown or saved, in steps.

    Args:
        log_every: progress lines when the output is no terminal; slow steps have more of them, one
            every few seconds. metrics.jsonl has every step.
        validate_every: validation losses; default: at the end of each epoch. Always at the end.
        checkpoint_every: checkpoints. Always at the end, and when interrupted.
        keep_checkpoints: how many of the newest checkpoints stay.
    """

    log_every: int = 10
    validate_every: int | None = None
    checkpoint_every: int = 100
    keep_checkpoints: int = 2


@dataclass
class EvaluateConfig:
    """Solve problems with the trained model, at the end: one token after another, and in threads.

    Args:
        data: file of prompts with products as ground truths; none: no evaluation.
        problems: how many of its rows, from the first on.
        max_new_tokens: most tokens of an answer, each the likeliest.
        batch_size: answers, or threads of them, decoded at once.
        kv_gigabytes: memory for keys and values, in 1e9 bytes.
    """

    data: str | None = None
    problems: int = 200
    max_new_tokens: int = 1024
    batch_size: int = 64
    kv_gigabytes: float = 2.0


class RunConfig(Protocol):
    """What the settings of every run hold.

    Attributes:
        command: its name on the command line.
        free_on_resume: settings, by dotted name, that a resumed run may change, besides those of
            FREE_ON_RESUME: none that reaches the weights.
    """

    command: ClassVar[str]
    free_on_resume: ClassVar[tuple[str, ...]]
    run_dir: str
    model: ModelConfig
    compute: ComputeConfig
    report: ReportConfig
    seed: int


class TrainingConfig(RunConfig, Protocol):
    """What the settings of a run of a Trainer hold.

    Attributes:
        trains_on: the setting that names its data, and what it says.
    """

    @property
    def optimization(self) -> AdamWConfig: ...

    @property
    def trains_on(self) -> str: ...


@dataclass
class SFTConfig:
    """Supervised fine-tuning on finished trajectories.

    Args:
        run_dir: folder of this run: config.yaml, metrics.jsonl, summary.json, TensorBoard events,
            checkpoints.
        seed: of a new model's weights and of the order of the data.
    """

    command: ClassVar[str] = "sft"
    free_on_resume: ClassVar[tuple[str, ...]] = ("data.train", "data.validation")  # by content

    run_dir: str
    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    seed: int = 0

    def __post_init__(self):
        self.model.check()
        check_at_least_one(self)

    @property
    def trains_on(self) -> str:
        return f"data.train: {self.data.train}"


AT_LEAST_ONE = (
    "optimization.epochs",
    "optimization.max_steps",
    "optimization.accumulation",
    "compute.threads",
    "report.log_every",
    "report.validate_every",
    "report.checkpoint_every",
    "report.keep_checkpoints",
    "evaluate.problems",
    "evaluate.max_new_tokens",
    "evaluate.batch_size",
)


def check_at_least_one(config: Any) -> None:
    """Raises ConfigError for a setting of AT_LEAST_ONE, where the config has it, that is less."""
    for name in AT_LEAST_ONE:
        try:
            value = attrgetter(name)(config)
        except AttributeError:
            continue
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}: it must be at least 1")


# What a resumed run may change: nothing that reaches the weights.
FREE_ON_RESUME = (
    "run_dir",
    "compute.device",
    "compute.threads",
    "report",
    "evaluate",
)


def parser_of(kind: type) -> ArgumentParser:
    """Parser of the settings of one kind of training; raises argparse.ArgumentError instead of
    leaving the process."""
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, description=kind.__doc__)
    parser.add_argument("--config", action="config", help="YAML file of settings.")
    parser.add_argument(
        "--resume", action="store_true", help="Continue the run in run_dir where it was stopped."
    )
    parser.add_class_arguments(kind, None)
    return parser


def config_of(kind: type[T], parser: ArgumentParser, settings: Namespace) -> T:
    """What a parser of `parser_of(kind)` read; ValueError for a setting that cannot be used."""
    made = parser.instantiate(settings)
    return kind(**{field.name: getattr(made, field.name) for field in fields(cast(Any, kind))})
