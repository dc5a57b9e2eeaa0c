"""Options of the commands that decode: limits, sampling, engine; each has the name of its field."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from threadweaver.device import Precision
from threadweaver.generate.sampler import SamplingParams
from threadweaver.generate.settings import EngineSizes, GenerationSettings
from threadweaver.generate.weaver import Mode
from threadweaver.trajectory import TemplateConfig

# Values of the option --dtype, the other name of --precision.
_PRECISIONS: dict[str, Precision] = {"auto": "auto", "bfloat16": "bf16", "float32": "fp32"}


@dataclass(frozen=True)
class EngineSettings(EngineSizes):
    """Where and in how much memory a model decodes.

    Args:
        device: auto takes the GPU if there is one.
        precision: of weights, keys and values: bf16, fp32, or auto: bf16 where the device
            multiplies bfloat16 itself, else fp32.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Precision = "auto"


_LIMITS = [f.name for f in fields(GenerationSettings) if f.name not in ("mode", "sampling")]


def add_options(parser: ArgumentParser, modes: Sequence[str]) -> None:
    """Adds the options of both commands: mode, model, chat template, limits, sampling (by default
    that of the published evaluation) and engine."""
    parser.add_argument(
        "--mode",
        choices=list(modes),
        default="parallel",
        help="parallel: threads are decoded at the same time; sequential: one token after another.",
    )
    parser.add_argument(
        "--model", type=str, required=True, help="Hugging Face folder, .gguf file, or smollm2."
    )
    parser.add_class_arguments(TemplateConfig, "template")
    parser.add_argument(
        "--chat",
        action="store_true",
        help="Short for --template.use auto; refuses a tokenizer without a chat template.",
    )
    parser.add_class_arguments(GenerationSettings, skip={"mode", "sampling"})
    parser.add_class_arguments(SamplingParams)
    parser.add_class_arguments(EngineSettings)
    parser.add_argument(
        "--dtype",
        choices=list(_PRECISIONS),
        help="Another name of --precision, which it overrides.",
    )
    parser.set_defaults(temperature=0.6, top_p=0.95)


def generation_settings(options: Namespace, mode: Mode) -> GenerationSettings:
    """Raises ValueError for sampling out of range; limits are checked with the first prompt."""
    limits = {name: options[name] for name in _LIMITS}
    sampling = SamplingParams(**{f.name: options[f.name] for f in fields(SamplingParams)})
    return GenerationSettings(mode=mode, sampling=sampling, **limits)


def template_config(options: Namespace) -> TemplateConfig:
    config = TemplateConfig(**vars(options.template))
    return replace(config, use="auto") if options.chat else config


def engine_settings(options: Namespace) -> EngineSettings:
    settings = EngineSettings(**{f.name: options[f.name] for f in fields(EngineSettings)})
    if options.dtype is None:
        return settings
    return replace(settings, precision=_PRECISIONS[options.dtype])
