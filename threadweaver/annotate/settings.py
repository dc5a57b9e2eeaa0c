"""Settings of the command."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from threadweaver.generate.options import EngineSettings
from threadweaver.generate.server.address import check_url
from threadweaver.generate.settings import GenerationSettings
from threadweaver.trajectory import TemplateConfig


@dataclass(frozen=True)
class TeacherSettings:
    """Who is asked, and how.

    Args:
        url: of an OpenAI-compatible server, such as http://localhost:8000/v1; null: the model runs
            in our own engine. The key is read from OPENAI_API_KEY.
        model: its name on the server; without a url a Hugging Face folder, .gguf file, or smollm2.
        at_once: trajectories that are worked on at the same time, each with one open request.
        timeout: seconds after which a request is given up and repeated; of a server.
        retries: how often a request is repeated if a server answers with 408, 409, 429, 5xx or
            nonsense, or not at all; longer and longer apart.
        temperature: null: the server's own; 0.6 in our engine.
        max_tokens: of a reply; null: the server's own; 4096 in our engine.
        extra: further fields of each request to a server: '{reasoning_effort: low}', or, of a model
            that refuses max_tokens, '{max_completion_tokens: 8000}'.
        constrain: let replies of a model in our engine go on only as their form allows (needs the
            package xgrammar).
        input_price, output_price: for a million tokens, in any currency; for the summary.

    Raises:
        ValueError: a setting out of range; names it.
    """

    url: str | None = None
    model: str | None = None
    at_once: int = 8
    timeout: float = 600.0
    retries: int = 5
    temperature: float | None = None
    max_tokens: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    constrain: bool = True
    input_price: float = 0.0
    output_price: float = 0.0

    def __post_init__(self) -> None:
        if self.url is not None:
            check_url("teacher.url", self.url)
        for name, least in (("at_once", 1), ("retries", 0), ("max_tokens", 1)):
            value = getattr(self, name)
            if value is not None and not least <= value <= 10**6:
                raise ValueError(f"teacher.{name} is {value}: it must be from {least} to {10**6:,}")
        if not 0 < self.timeout < math.inf:
            raise ValueError(f"teacher.timeout is {self.timeout}: it must be above 0 and finite")
        for name in ("temperature", "input_price", "output_price"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"teacher.{name} is {value}: it must be at least 0 and finite")
        if set(self.extra) & {"model", "messages", "stream", "n"}:
            raise ValueError("teacher.extra: model, messages, stream and n are set already")
        try:
            json.dumps(self.extra, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"teacher.extra cannot be sent as JSON: {error}") from error


@dataclass(frozen=True)
class AnnotateSettings:
    """What the command was asked for; each field is an option of that name.

    Raises:
        ValueError: one that cannot be met; names it.
    """

    data: str
    out: Path | None
    student: str | None
    limit: int | None
    prompts: Path | None
    dry_run: bool
    seed: int
    teacher: TeacherSettings
    generation: GenerationSettings
    template: TemplateConfig
    engine: EngineSettings

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit is {self.limit}: it must be at least 1")
        if self.dry_run:
            return
        for name, value, what in (
            ("out", self.out, "a folder"),
            ("student", self.student, "the model that is to learn"),
            ("teacher.model", self.teacher.model, "the teacher, on its server or to run here"),
        ):
            if not value:
                raise ValueError(f"{name}: name {what}")
