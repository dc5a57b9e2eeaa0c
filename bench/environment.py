"""The machine, software and commit of a result, and the folder that results are kept in."""

import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    *("torch", "triton", "numpy", "transformers"),
    *("flash-attn", "flash-attn-3", "fa3-fwd", "flash-attn-4", "flashinfer-python"),
)
REPOSITORY = Path(__file__).parent.parent
# The files that a result depends on: all but the documentation and the results.
SOURCES = ("--", ":/", ":(top,exclude)bench/results", ":(top,exclude)docs")
# Variables that limit a CPU to some of its instruction sets.
HOLDS = ("TW_CPU", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
CPU_FAMILIES = ("epyc", "xeon", "ryzen", "neoverse", "graviton")


def environment(device: str) -> dict[str, Any]:
    """The `env` record of a result file. Where git knows no commit, it is TW_COMMIT: a machine that
    is lent has the files of a tree and not its history."""
    from tw_kernels.cpu import processor_name  # `bench gpu` begins before it can be imported

    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor_name(),
        "device_type": device,
        "cpu": processor_name(),
        "held_to": {name: os.environ[name] for name in HOLDS if name in os.environ},
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if device == "cuda"
        else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {package: v for package in PACKAGES if (v := _version(package))},
        "commit": _output("git", "rev-parse", "HEAD") or os.environ.get("TW_COMMIT"),
        "dirty": bool(_output("git", "status", "--porcelain", "--untracked-files=no", *SOURCES)),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", "-m", *_module(), *sys.argv[1:]]),
    }


def results_folder(env: dict[str, Any]) -> Path:
    """The folder of a run's results: bench/results/<device>/<date>-<commit>, with -dirty appended
    if the sources differed from the commit."""
    commit = (env["commit"] or "unknown")[:9]
    run = f"{env['date'][:10]}-{commit}{'-dirty' if env['dirty'] else ''}"
    return REPOSITORY / "bench" / "results" / device_slug(env) / run


def device_slug(env: dict[str, Any]) -> str:
    """The device as part of a path, e.g. epyc-2-cores or nvidia-h100: a CPU's family, cores and, if
    limited, instruction set; a GPU's name without its memory."""
    name = re.sub(r"[^a-z0-9]+", "-", env["device"].lower()).strip("-")
    if env["device_type"] == "cuda":
        return re.sub(r"-\d+gb\b.*", "", name)
    family = next((family for family in CPU_FAMILIES if family in name), name)
    held = env.get("held_to", {}).get("TW_CPU")
    return f"{family}-{env['cpu_count']}-cores" + (f"-{held}" if held else "")


def _module() -> list[str]:
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return [spec.name.removesuffix(".__main__")] if spec else [Path(sys.argv[0]).name]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """The output of a command; None if it fails or does not exist."""
    try:
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
