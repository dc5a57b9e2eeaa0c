"""Where the time of one engine step goes: `python -m bench step --device cuda --json FILE`.

A model of random weights (bench/models.py) decodes a prompt with a few threads; after a warm-up,
steps of one token a thread are timed, and then seen by PyTorch's profiler: once as tokens are drawn
by default, once cut by top_k and top_p as Qwen3 recommends. A line of a table is one kernel of one
step, as in `python -m bench profile`; below it stand

    ms          wall-clock of a step, without a profiler
    floor       that of reading all weights once, at the rate of a copy of the same run
    kernels     launches on the device (on a CPU, operators); us: their time together
    captures, copies to and from the device, casts
                of the timed steps: none; one of each a step; none
"""

from __future__ import annotations

import time
from argparse import ArgumentError
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from transformers import PreTrainedModel

from bench.environment import environment
from bench.meter import meter_for
from bench.models import SHAPES, product_weights, random_model
from bench.profile import CALLS, kernels, table
from bench.record import write_json
from bench.roofline import measure_roofline
from bench.selection import check_device, check_folder
from bench.suite import UsageError
from bench.table import console
from threadweaver.command import explain, fail
from threadweaver.device import DTYPES
from threadweaver.generate import Engine, GenerationSettings
from threadweaver.generate.sampler import SamplingParams
from threadweaver.model import build_tokenizer
from threadweaver.trajectory import Codec

WARM_UP, TIMED, PROFILED = 10, 50, CALLS  # steps
# Name in the file -> how its steps draw tokens.
SAMPLINGS = {
    "step": SamplingParams(),
    "truncated_step": SamplingParams(temperature=0.6, top_k=20, top_p=0.95),
}


@dataclass(frozen=True)
class StepProfile:
    """What a profile of a step says; see the module's docstring."""

    model: str
    threads: int
    prompt: int
    sampling: SamplingParams
    ms: float
    floor_ms: float | None
    launches: float
    us: float
    counts: dict[str, int]
    seconds: dict[str, float]
    kernels: list[dict[str, Any]]


def decoding_engine(
    model: PreTrainedModel, codec: Codec, threads: int, prompt: int, sampling: SamplingParams
) -> Engine:
    """An engine in the middle of so many responses to one prompt, none of which ends by itself."""
    engine = Engine(model, codec, max_sequences=threads)
    length = 2 * WARM_UP + TIMED + PROFILED  # some begin later than others
    settings = GenerationSettings(max_tokens=length, mode="sequential", sampling=sampling)
    for seed in range(threads):
        engine.add([7] * prompt, settings, seed, script={(0,): [9] * length})
    while engine.decoded_tokens < threads * WARM_UP:
        engine.step()
    return engine


def profile_steps(name: str, device: str, threads: int, prompt: int) -> dict[str, StepProfile]:
    """Times and profiles steps of one token a thread, by each of SAMPLINGS."""
    tokenizer = build_tokenizer()
    dtype = DTYPES["bf16" if device == "cuda" else "fp32"]
    model = random_model(name, tokenizer, device, dtype).eval()
    floor, codec = _floor(model, device), Codec.from_tokenizer(tokenizer)

    def profiled(sampling: SamplingParams) -> StepProfile:
        engine = decoding_engine(model, codec, threads, prompt, sampling)
        before, seconds = asdict(engine.counts), engine.seconds
        start = time.perf_counter()
        for _ in range(TIMED):
            engine.step()
        ms = (time.perf_counter() - start) * 1e3 / TIMED
        counts = {key: n - before[key] for key, n in asdict(engine.counts).items()}
        spent = {key: (s - seconds[key]) / TIMED for key, s in engine.seconds.items()}
        rows = kernels(lambda _: engine.step(), 1, device)
        launches = sum(row["launches"] for row in rows)
        us = sum(row["launches"] * row["us"] for row in rows)
        return StepProfile(
            name, threads, prompt, sampling, ms, floor, launches, us, counts, spent, rows
        )

    return {key: profiled(sampling) for key, sampling in SAMPLINGS.items()}


def _floor(model: PreTrainedModel, device: str) -> float | None:
    """Milliseconds to read all weights that a token is multiplied by; None on a CPU."""
    if device != "cuda":
        return None
    gb_per_s = measure_roofline(meter_for(device), quick=False)["copy_gb_per_s"]
    return product_weights(model) * model.dtype.itemsize / gb_per_s / 1e6


def step_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m bench step", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", choices=list(SHAPES), help="default: 1.7B, on a CPU tiny")
    parser.add_argument("--threads", type=int, default=4, help="sequences of a step; default 4")
    parser.add_argument("--prompt", type=int, default=512, help="its tokens; default 512")
    parser.add_argument("--json", type=Path, help="file to write")
    return parser


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    parser = step_parser()
    try:
        given = parser.parse_args(arguments)
        check_device(given.device)
        check_folder(given.json)
    except ArgumentError as error:
        return fail(explain(str(error), parser.get_defaults()), 2)
    except UsageError as error:
        return fail(error, 2)
    for name in ("threads", "prompt"):
        if getattr(given, name) < 1:
            return fail(f"--{name} is {getattr(given, name)}: it must be at least 1", 2)
    name = given.model or ("1.7B" if given.device == "cuda" else "tiny")
    found = profile_steps(name, given.device, given.threads, given.prompt)
    for profile in found.values():
        _show(profile)
    if given.json:
        steps = {key: asdict(profile) for key, profile in found.items()}
        try:
            write_json(given.json, {"env": environment(given.device), **steps})
        except OSError as error:
            return fail(error, 1)
    return 0


def _show(found: StepProfile) -> None:
    floor = "" if found.floor_ms is None else f", {found.ms / found.floor_ms:.1f} x the floor"
    counts = ", ".join(f"{n} {key.replace('_', ' ')}" for key, n in found.counts.items())
    drawn = ", ".join(f"{key} {value}" for key, value in asdict(found.sampling).items())
    console().print(table(found.kernels))
    console().print(
        f"{found.ms:.2f} ms a step{floor}; "
        f"{found.launches:.0f} kernels, {found.us:.0f} us; {counts}; {drawn}"
    )
