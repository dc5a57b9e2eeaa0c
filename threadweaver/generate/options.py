"""Options of the commands that decode: limits, sampling, engine; each has the name of its field."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from threadweaver.generate.sampler import SamplingParams
from threadweaver.generate.settings import EngineSizes, GenerationSettings
from threadweaver.generate.weaver import Mode


@dataclass(frozen=True)
class EngineSettings(EngineSizes):
    """Where and in how much memory a model decodes.

    Args:
        device: auto takes the GPU if there is one.
        dtype: of weights, keys and values; auto: bfloat16 on a GPU, float32 on the CPU.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"


_LIMITS = [f.name for f in fields(GenerationSettings) if f.name not in ("mode", "sampling")]


def add_options(parser: ArgumentParser) -> None:
    """Adds every field but the mode; tokens are drawn as in the published evaluation (SPEC)."""
    parser.add_class_arguments(GenerationSettings, skip={"mode", "sampling"})
    parser.add_class_arguments(SamplingParams)
    parser.add_class_arguments(EngineSettings)
    parser.set_defaults(temperature=0.6, top_p=0.95)


def generation_settings(options: Namespace, mode: Mode) -> GenerationSettings:
    """Raises ValueError for sampling out of range; limits are checked with the first prompt."""
    limits = {name: options[name] for name in _LIMITS}
    sampling = SamplingParams(**{f.name: options[f.name] for f in fields(SamplingParams)})
    return GenerationSettings(mode=mode, sampling=sampling, **limits)


def engine_settings(options: Namespace) -> EngineSettings:
    return EngineSettings(**{f.name: options[f.name] for f in fields(EngineSettings)})
