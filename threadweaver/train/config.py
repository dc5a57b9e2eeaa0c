"""Settings that several kinds of run share, and how settings are read.

Every field is a command-line option of the same name (`--optimization.learning_rate 3e-4`) and a
key of the YAML file given as `--config`; options win. Defaults are the published ones
(docs/semantics.md, "Stages and published defaults").
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, Literal, TypeVar, cast, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader, set_loader

from threadweaver.trajectory import TemplateConfig
from threadweaver.trajectory.loss import Loss

T = TypeVar("T")
MOST = 2**31 - 1  # of what is counted
MOST_THREADS = 1024
OptimizerName = Literal["adamw", "adamw-8bit", "adamw-offload"]
TrackerName = Literal["tensorboard", "wandb", "trackio"]


# Settings, of any kind of run, that name files or folders.
PATHS = (
    "run_dir",
    "model.path",
    "data.train",
    "data.validation",
    "task.name",
    "task.options.path",
    "sft.data",
    "evaluate.data",
    "evaluate.options.path",
    "report.overlap",
)


class ConfigError(ValueError):
    """A setting that cannot be used; the message names the field and says what to do."""


def check_names(setting: str, options: dict[Any, Any]) -> None:
    """Raises ConfigError for an option whose name is no text, as YAML may have it."""
    for name in options:
        if not isinstance(name, str):
            raise ConfigError(f"{setting}: an option is called {name!r}: names are texts")


def check_least(least: int, section: str, settings: object, *names: str) -> None:
    """Raises ConfigError for the first of these settings that is a number less than `least`, or
    more than any count can be."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < least:
            raise ConfigError(f"{section}.{name} is {value}: it must be at least {least}")
        if value is not None and value > MOST:
            raise ConfigError(f"{section}.{name} is {value}: it must be at most {MOST}")


@dataclass
class LoraConfig:
    """Which adapters are trained in place of the model's weights (LoRA, arXiv 2106.09685).

    Args:
        rank: of the product that is added to a matrix.
        alpha: that product counts alpha / rank times.
        targets: names of the linear layers that get one, such as [q_proj, v_proj]; all-linear: all
            but the output layer and, in a model with experts, those of attention alone.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: list[str] | str = "all-linear"

    def __post_init__(self):
        check_least(1, "lora", self, "rank")
        if not 0 < self.alpha < math.inf:
            raise ConfigError(f"lora.alpha is {self.alpha}: it must be above 0 and finite")
        if not self.targets:
            raise ConfigError("lora.targets is empty: name linear layers, or leave it out")


@dataclass
class ModelConfig:
    """What is trained. Exactly one of `path` and `arch`.

    Args:
        path: Hugging Face folder (config, safetensors, tokenizer), .gguf file, or smollm2. Tags
            that its tokenizer lacks are added.
        arch: fields of a Hugging Face config of a new model, `model_type` and all sizes among
            them, initialised from the seed; it gets ThreadWeaver's own small tokenizer.
        lora: train adapters, and the rows of the tags, while all else stays as it is; needs the
            extra `lora`. Default: all weights are trained.
    """

    path: str | None = None
    arch: dict[str, Any] | None = None
    lora: LoraConfig | None = None

    def __post_init__(self):
        if (self.path is None) == (self.arch is None):
            raise ConfigError(
                "model.path, model.arch: set exactly one: path for a model on disk, arch for a new "
                "one"
            )


@dataclass
class DataConfig:
    """What it is trained on.

    Args:
        train: JSON lines or parquet file of trajectories, a folder or a pattern of such files.
        validation: a file like it, for the validation loss.
        loss: response: every response token but forced headers; completions: only what the model
            itself would sample; sequential: the whole text as one ordinary sequence
            (docs/semantics.md, "Calls, tries, loss").
        max_depth: how deep blocks nest; a block that is deeper breaks the format.
        malformed: what to do with a trajectory that breaks the format: error, or drop and count.
    """

    train: str
    validation: str | None = None
    loss: Loss = "response"
    malformed: Literal["error", "drop"] = "error"
    max_depth: int = 1

    def __post_init__(self):
        check_least(1, "data", self, "max_depth")


@dataclass
class TaskConfig:
    """Where prompts come from and what grades the answers (threadweaver.tasks).

    Args:
        name: multiplication, reasoning_gym:<dataset>, or the path of a data file, a folder or a
            pattern of such files.
        options: of that task, by name.
        problems: how many training problems are drawn; default: all there are.
    """

    name: str = "multiplication"
    options: dict[str, Any] = field(default_factory=dict)
    problems: int | None = None

    def __post_init__(self):
        check_least(1, "task", self, "problems")
        check_names("task.options", self.options)


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
        optimizer: adamw: both moments on the device, in the dtype of the parameters; adamw-8bit:
            moments of 8 bits; adamw-offload: moments, and the step, on the host, for a GPU, and not
            on several ranks. The latter two need the extra `memory`.
    """

    batch_tokens: int = 40960
    learning_rate: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 1e-4
    warmup: float = 0.05
    gradient_clip: float = 1.0
    optimizer: OptimizerName = "adamw"

    def __post_init__(self):
        for name, valid, rule in (
            ("batch_tokens", 1 <= self.batch_tokens <= MOST, f"at least 1 and at most {MOST}"),
            ("learning_rate", 0 < self.learning_rate < math.inf, "above 0 and finite"),
            ("betas", all(0 <= beta < 1 for beta in self.betas), "in [0, 1)"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "at least 0 and finite"),
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

    def __post_init__(self):
        super().__post_init__()
        check_least(1, "optimization", self, "epochs", "max_steps", "accumulation")


@dataclass
class ComputeConfig:
    """What it is trained with.

    Args:
        device: auto takes the GPU if there is one.
        precision: bf16: bfloat16 autocast over float32 weights; fp32: everything in float32; auto:
            bf16 where the device multiplies bfloat16 itself, else fp32. A run keeps what it started
            with: config.yaml and checkpoints hold it, and why.
        parameters: dtype of the model's weights. bf16: half the memory for weights, gradients and
            moments, updates rounded to one of the two nearest values at random, in proportion to
            how near they are; needs the extra `memory` and precision bf16, which auto then is.
            With model.lora: of the weights that stay; adapters are in float32, and need no extra.
        device_gb: memory of the device for --plan, in 1e9 bytes; default: what it has.
        ranks: for --plan, how many there are, with a device each; default: as many as torchrun
            started.
        gradient_checkpointing: recompute activations in the backward pass instead of keeping them,
            but for the results of attention: true: of all layers; a number: of so many, from the
            first on. Use as few as the memory allows.
        activation_offload: keep activations on the host between forward and backward pass, for a
            GPU. With gradient_checkpointing, without which there are far more of them to copy.
        pass_tokens: most tokens of a forward and backward pass; a larger trie or pack of tries is
            computed in several, whose gradients add up to its own. What they share is computed in
            each, which costs time. No path is cut, so the longest may be more; default: on a GPU
            as many as fit its memory by --plan, on a CPU no limit.
        compile: run the model's layers through torch.compile.
        threads: CPU threads of PyTorch; default: as many as PyTorch takes, or, in a resumed run, as
            many as before.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    parameters: Literal["fp32", "bf16"] = "fp32"
    device_gb: float | None = None
    ranks: int | None = None
    gradient_checkpointing: bool | int = False
    activation_offload: bool = False
    pass_tokens: int | None = None
    compile: bool = False
    threads: int | None = None

    def __post_init__(self):
        check_least(1, "compute", self, "pass_tokens", "ranks", "threads")
        if self.device_gb is not None and not 0 < self.device_gb < math.inf:
            raise ConfigError(
                f"compute.device_gb is {self.device_gb}: it must be above 0 and finite"
            )
        if self.parameters == "bf16" and self.precision == "fp32":
            raise ConfigError(
                "compute.parameters is bf16 and compute.precision fp32: bfloat16 parameters are "
                "multiplied in bfloat16; set precision bf16"
            )
        if self.parameters == "bf16":
            self.precision = "bf16"
        if not isinstance(self.gradient_checkpointing, bool):
            check_least(0, "compute", self, "gradient_checkpointing")
        if self.threads is not None and self.threads > MOST_THREADS:
            raise ConfigError(
                f"compute.threads is {self.threads}: it must be at most {MOST_THREADS}"
            )


@dataclass
class ReportConfig:
    """How often something is shown or saved, in steps.

    Args:
        log_every: progress lines when the output is no terminal; slow steps have more of them, one
            every few seconds. metrics.jsonl has every step.
        validate_every: validation: of SFT, the loss on data.validation (default: at the end of each
            epoch), of P-GRPO, held-out problems in both modes (default: never). Always at the end.
        checkpoint_every: checkpoints. Always at the end, and when interrupted.
        keep_checkpoints: how many of the newest checkpoints stay.
        export: with which checkpoints a plain Hugging Face folder, merged and unsharded, is written
            where the checkpoint itself is none (adapters, or shards of many GPUs): end: with the
            last one, from which what comes next starts; every: with each.
        trackers: where the figures of each step go besides metrics.jsonl, under the same names:
            tensorboard (files in run_dir), wandb, trackio.
        overlap: data files of benchmarks: how many of their problems share 13 words in a row with
            the training data is shown before the first step, and stands in summary.json.
    """

    log_every: int = 10
    validate_every: int | None = None
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    export: Literal["end", "every"] = "end"
    trackers: list[TrackerName] = field(default_factory=lambda: ["tensorboard"])
    overlap: list[str] = field(default_factory=list)

    def __post_init__(self):
        others = ("export", "trackers", "overlap")
        check_least(1, "report", self, *(f.name for f in fields(self) if f.name not in others))


@dataclass(kw_only=True)
class RunConfig:
    """What the settings of every run hold.

    Args:
        run_dir: folder of this run.
        template: how prompts become text.
        seed: of all that is drawn.

    Attributes:
        command: its name on the command line.
        free_on_resume: settings and sections of them, by dotted name, that a resumed run may
            change: none that says what the weights are. (Sizes of an engine or of passes,
            and recomputed activations, may make a sum round otherwise.)
    """

    command: ClassVar[str]
    free_on_resume: ClassVar[tuple[str, ...]] = (
        "run_dir",
        "compute.device",
        "compute.device_gb",
        "compute.ranks",
        "compute.threads",
        "compute.gradient_checkpointing",
        "compute.activation_offload",
        "compute.pass_tokens",
        "report",
        "evaluate",
    )

    run_dir: str
    model: ModelConfig
    template: TemplateConfig = field(default_factory=TemplateConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    seed: int = 0

    def __post_init__(self):
        if not self.run_dir or "\0" in self.run_dir:
            raise ConfigError("run_dir: name a folder")
        if not -(2**63) <= self.seed < 2**63:
            raise ConfigError(f"seed is {self.seed}: it must be from -2^63 to 2^63 - 1")


MOST_VALUES = 100_000  # of a config file, aliases written out


def _load_yaml(text: str) -> Any:
    """As jsonargparse loads it, unless aliases of aliases make it endless."""
    value = _load_any_yaml(text)
    count, left = 0, [value] if "*" in text else []
    while left:
        inner = left.pop()
        count += 1
        if count > MOST_VALUES:
            raise yaml.YAMLError(f"its aliases stand for more than {MOST_VALUES:,} values")
        if isinstance(inner, dict | list):
            left += inner.values() if isinstance(inner, dict) else inner
    return value


_load_any_yaml = get_loader("yaml")
set_loader("yaml", _load_yaml, (yaml.YAMLError,))


def parser_of(kind: type) -> ArgumentParser:
    """Parser of the settings of one kind of training; raises argparse.ArgumentError instead of
    leaving the process."""
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, description=kind.__doc__)
    parser.add_argument("--config", action="config", help="YAML file of settings.")
    parser.add_argument(
        "--resume", action="store_true", help="Continue the run in run_dir where it was stopped."
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="Only show what the run will hold in memory, and whether it fits.",
    )
    parser.add_class_arguments(kind, None)
    return parser


def config_of(kind: type[T], settings: Namespace) -> T:
    """What a parser of `parser_of(kind)` read.

    Raises:
        ConfigError: a setting that cannot be used, by its whole name (sft.optimization.epochs).
    """
    return _made(kind, settings, "")


def _made(kind: type[T], settings: Namespace, section: str) -> T:
    types, values = get_type_hints(kind), {}
    for name in (f.name for f in fields(cast(Any, kind))):
        value, whole_name = settings[name], f"{section}.{name}".lstrip(".")
        if value is None and type(None) not in get_args(types[name]):
            raise ConfigError(f"{whole_name} is null: give it a value or leave it out")
        section_of = next(filter(is_dataclass, (types[name], *get_args(types[name]))), None)
        if section_of is not None and value is not None:
            if not isinstance(value, Namespace):
                raise ConfigError(f"{whole_name} is {value!r}: it must be a section of settings")
            value = _made(cast(type, section_of), value, whole_name)
        values[name] = value
    try:
        return kind(**values)
    except ValueError as error:
        # Messages name the field, and some the last part of the section before it.
        outer, _, last = section.rpartition(".")
        prefix = outer if str(error).startswith(f"{last}.") else section
        raise ConfigError(f"{prefix}.{error}".lstrip(".")) from error
