"""The cases of bench.rollout: recorded requests, and the model that they are for."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from transformers import PreTrainedModel

from bench.environment import REPOSITORY
from bench.suite import UsageError
from threadweaver.data import DataError, load_examples
from threadweaver.device import DTYPES
from threadweaver.model import add_tags, build_tokenizer, load_model, new_model, to_device
from threadweaver.tasks.multiplication import question, trajectory
from threadweaver.trajectory import Codec

WORDS = (
    "the a of to and in that it is was for on with as at by we they from this one two all each so "
    "then but when where river stone light water morning house garden number part sum table paper "
    "walk carry open find count write turn hold small large old new first last quiet long over"
)


class Trajectory(NamedTuple):
    """Token ids of a request and its response, which ends with the end token.

    Attributes:
        source: file and line it was read from, for error messages.
    """

    prompt: list[int]
    response: list[int]
    source: str = ""


class Language:
    """A model with its tokenizer's codec, loaded at the first use of either.

    Raises:
        UsageError: at the first use: there is no such model.
    """

    def __init__(self, name: str, dtype: str, device: str):
        self.name, self.dtype, self._device = name, dtype, device

    @cached_property
    def _loaded(self) -> tuple[PreTrainedModel, Codec]:
        if self.name == "tiny":
            settings = yaml.safe_load((REPOSITORY / "configs" / "sft-demo.yaml").read_text())
            tokenizer = build_tokenizer()
            model = new_model(tokenizer, settings["model"]["arch"])
        else:
            try:
                model, tokenizer = load_model(self.name, DTYPES[self.dtype])
            except ValueError as error:
                raise UsageError(f"--model: {error}") from error
            add_tags(tokenizer, model)
        torch.nn.Module.to(model, self._device, DTYPES[self.dtype])
        to_device(model, torch.device(self._device))
        return model.eval(), Codec.from_tokenizer(tokenizer)

    @property
    def model(self) -> PreTrainedModel:
        return self._loaded[0]

    @property
    def codec(self) -> Codec:
        return self._loaded[1]

    def text(self, rng: random.Random, n: int) -> list[int]:
        """Ids of n >= 1 tokens of random words."""
        return self.codec.encode(" ".join(rng.choices(WORDS.split(), k=n)))[:n]


@dataclass(frozen=True)
class Case:
    """Requests that are all submitted at the start.

    Attributes:
        slots: largest number of threads that a step of our engine advances.
        build: the requests for a model.
    """

    name: str
    requests: int
    slots: int
    build: Callable[[Language], list[Trajectory]] = field(repr=False)


def fork_join(requests: int, threads: int = 4, length: int = 64) -> Case:
    """Requests with one block of equal threads. `length`: tokens of a thread, with its </Thread>
    but without its header."""

    def build(language: Language) -> list[Trajectory]:
        codec, rng = language.codec, random.Random(requests)

        def one() -> Trajectory:
            numbers = range(1, threads + 1)
            outlines = "".join(f"<Outline>{n}: part {n}</Outline>\n" for n in numbers)
            response = language.text(rng, 16)
            response += codec.encode(f"<Parallel>\n<Outlines>\n{outlines}</Outlines>")
            response += codec.newline_ids
            for n in numbers:
                response += codec.encode(f"<Thread>\n{n}:") + language.text(rng, length - 1)
                response.append(codec.tag_ids["</Thread>"])
            response += [*codec.newline_ids, codec.tag_ids["</Parallel>"]]
            response += language.text(rng, 16)
            return Trajectory(language.text(rng, 64), [*response, codec.eos_id])

        return [one() for _ in range(requests)]

    return Case(f"fork-join-{requests}", requests, requests * threads, build)


def multiplication(requests: int, digits: tuple[int, int] = (3, 3)) -> Case:
    """Products of two factors, of so many digits; a thread for each digit of the second."""

    def build(language: Language) -> list[Trajectory]:
        codec, rng = language.codec, random.Random(requests)

        def one() -> Trajectory:
            factors = [rng.randrange(10 ** (n - 1), 10**n) for n in digits]
            response = codec.encode(trajectory(factors, parallel=True))
            return Trajectory(codec.encode(question(factors)), [*response, codec.eos_id])

        return [one() for _ in range(requests)]

    return Case("multiplication", requests, requests * digits[1], build)


def replayed(path: Path, rows: int) -> Case:
    """The first rows of a data file.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        examples = load_examples(path)[:rows]
    except DataError as error:
        raise UsageError(f"--replay: {error}") from error

    def build(language: Language) -> list[Trajectory]:
        codec = language.codec
        return [
            Trajectory(
                codec.encode_prompt(example.prompt),
                [*codec.encode(example.response), codec.eos_id],
                f"--replay: {example.source}",
            )
            for example in examples
        ]

    threads = max(example.response.count("</Thread>") for example in examples)
    return Case(path.name, len(examples), len(examples) * max(1, threads), build)


def mixed(requests: int, slots: int, longest: int) -> Case:
    """Requests without threads, prompts of 8 to 64 tokens and responses of 8 to `longest`."""

    def build(language: Language) -> list[Trajectory]:
        rng = random.Random(requests)
        return [
            Trajectory(
                language.text(rng, rng.randint(8, 64)),
                [*language.text(rng, rng.randint(8, longest) - 1), language.codec.eos_id],
            )
            for _ in range(requests)
        ]

    return Case(f"mixed-{requests}", requests, slots, build)
