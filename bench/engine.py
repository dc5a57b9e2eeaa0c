"""The engine on models of real shapes with random weights: `python -m bench.engine --help`.

As bench.rollout: all rows generate the same recorded tokens. On CUDA models of 1.7 B and 8 B
parameters, on a CPU a tiny one (bench/models.py); weights are made on the device.

    ours, parallel          threads at the same time
    ours, sequential        one token after another, tags included
    transformers generate   likewise, on the same weights, in one padded batch; only the first
                            tokens of each response, as many as fit in --generate_seconds

    fork-join-N    N requests: a prompt of 64 tokens, four threads of 64, some text around them

    tok/s          tokens of the responses over the time; forced ones included
    ms/step        mean time of a forward pass with all around it
    x floor        that over its floor: the time to read all weights once at the rate of a copy, or
                   to multiply all tokens by them at the rate of a matrix product, both of the same
                   run, whichever is longer
    x seq, x generate
                   tok/s over that of ours, sequential; of transformers
    the others     as in bench.rollout
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from transformers import PreTrainedModel

from bench.models import check_names, product_weights, random_model
from bench.rollout import COLUMNS, OURS, SEQUENTIAL
from bench.rollout import relate as relate_latency
from bench.rollout_cases import Case, Language, fork_join
from bench.rollout_peers import GENERATE, generate
from bench.rollout_setup import Generated, RolloutSetup
from bench.roofline import Work
from bench.running import suite_main
from bench.suite import Options, Peer, Row, Suite, UsageError, at_least_one
from threadweaver.device import DTYPES, Precision, resolve
from threadweaver.model import build_tokenizer
from threadweaver.trajectory import Codec


@dataclass
class EngineOptions(Options):
    """Options of bench.engine, in addition to those of every benchmark.

    Args:
        models: names of shapes: tiny, 1.7B or 8B. Default: 1.7B and 8B, on a CPU or with --quick
            tiny.
        dtype: of weights, keys and values; auto: bf16 where the device multiplies it, else fp32.
        requests: of the larger case. Default: 64, on a CPU 8.
        length: tokens of a thread.
        generate_seconds: most seconds of one call of transformers.
    """

    models: list[str] = field(default_factory=list)
    dtype: Precision = "auto"
    requests: int | None = None
    length: int = 64
    generate_seconds: float = 2.0


class RandomLanguage(Language):
    """A model of random weights, made at its first use."""

    @cached_property
    def _loaded(self) -> tuple[PreTrainedModel, Codec]:
        tokenizer = build_tokenizer()
        model = random_model(self.name, tokenizer, self._device, DTYPES[self.dtype])
        return model.eval(), Codec.from_tokenizer(tokenizer)


class EngineSetup(RolloutSetup):
    """A case on a model of random weights.

    Args:
        generate_seconds: most seconds of one call of transformers.
    """

    def __init__(self, case: Case, language: Language, generate_seconds: float):
        super().__init__(case, language)
        self.generate_seconds = generate_seconds

    def check(self, peer: str, result: Generated, inputs: int) -> str | None:
        if peer != GENERATE:
            return super().check(peer, result, inputs)
        for i, (got, t) in enumerate(zip(result.responses, self.trajectories, strict=True)):
            if not got or got != t.response[: len(got)]:
                return f"request {i} did not get the first tokens of its recorded response"
        self.measured[peer] = {"steps": result.steps, "tokens": sum(map(len, result.responses))}
        return None

    def work(self, peer: str) -> Work:
        """Reading the weights in every step, and multiplying every token by them once."""
        weights = product_weights(self.language.model)
        made = self.measured[peer].get("tokens", self.total_tokens)
        prompts = sum(len(t.prompt) for t in self.trajectories)
        dtype = self.language.model.dtype
        return Work(
            2 * weights * (prompts + made),
            self.measured[peer]["steps"] * weights * dtype.itemsize,
            str(dtype).removeprefix("torch."),
        )


def _capped(setup: RolloutSetup) -> Callable[[int], Generated]:
    assert isinstance(setup, EngineSetup)
    return generate(setup, setup.generate_seconds)


def setups(options: EngineOptions) -> Iterator[EngineSetup]:
    at_least_one(options, "requests", "length")
    if options.generate_seconds <= 0:
        raise UsageError(f"--generate_seconds is {options.generate_seconds:g}: it must be positive")
    cpu = options.device == "cpu"
    names = options.models or (["tiny"] if cpu or options.quick else ["1.7B", "8B"])
    check_names(names)
    precision = resolve(options.dtype, torch.device(options.device))
    many = options.requests or (8 if cpu else 64)
    make: functools.partial[Case] = functools.partial(fork_join, length=options.length)
    cases = [make(1), make(many)] if many > 1 else [make(1)]
    if options.quick:
        cases = [fork_join(options.requests or 1, threads=2, length=16)]
    for name in names:
        language = RandomLanguage(name, precision, options.device)
        for case in cases:
            yield EngineSetup(case, language, options.generate_seconds)


def relate(rows: dict[str, Row]) -> None:
    for row in rows.values():
        # By the rate and not the time: a call of transformers may make fewer tokens.
        row["ratios"] = {
            name: row["tokens_per_second"] / other["tokens_per_second"]
            for name, other in rows.items()
            if other is not row
        }
        row["of_floor"] = 1 / row["roofline"]
    relate_latency(rows)


SUITE = Suite(
    name="engine",
    options=EngineOptions,
    setups=setups,
    peers=[*OURS, Peer(GENERATE, _capped)],
    columns={**COLUMNS, "of_floor": "x floor"},
    versus={SEQUENTIAL: "x seq", GENERATE: "x generate"},
    relate=relate,
)

if __name__ == "__main__":
    raise SystemExit(suite_main(SUITE))
