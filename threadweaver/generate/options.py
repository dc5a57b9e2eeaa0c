"""Options of the commands that decode: limits, sampling, engine; each has the name of its field."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from threadweaver.generate.sampler import SamplingParams
from threadweaver.generate.settings import GenerationSettings
from threadweaver.generate.weaver import Mode


@dataclass(frozen=True)
class EngineSettings:
    """Where and in how much memory a model decodes.

    Args:
        device: auto takes the GPU if there is one.
        dtype: of weights, keys and values; auto: bfloat16 on a GPU, float32 on the CPU.
        kv_gigabytes: memory for keys and values, in 1e9 bytes.
        page_size: tokens a KV page.
        max_sequences: most threads, of all responses together, that a step advances.
        max_batch_tokens: most new tokens of a step; longer prefills go in chunks.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    kv_gigabytes: float = 2.0
    page_size: int = 16
    max_sequences: int = 64
    max_batch_tokens: int = 2048


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
