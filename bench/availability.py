"""Why a peer cannot run on a device or in this installation: reasons for `Peer.why_absent`."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch


def cuda_only(device: str) -> str | None:
    """The reason on any device but CUDA."""
    return None if device == "cuda" else "runs on CUDA only"


def interpreted(backend: str, device: str) -> str | None:
    """The reason for a backend in Triton on a CPU."""
    is_interpreted = backend == "triton" and device == "cpu"
    return "runs in Triton's interpreter on a CPU, which is for tests" if is_interpreted else None


def why_not_importable(module: str, name: str, distribution: str) -> str | None:
    """Why `from module import name` fails, or None; `distribution` is what to install."""
    try:
        found = hasattr(importlib.import_module(module), name)
    except ModuleNotFoundError:
        found = False
    except Exception as error:  # whatever a package built for another torch raises
        return f"{distribution} cannot be imported: {(str(error).splitlines() or [''])[0]}"
    return None if found else f"{distribution} is not installed"


def lacks(function: Callable[..., Any], *parameters: str) -> str | None:
    """The reason if a function of torch lacks one of these parameters, or None."""
    missing = [p for p in parameters if p not in inspect.signature(function).parameters]
    name = function.__name__
    return f"{name} of torch {torch.__version__} takes no {missing[0]}" if missing else None
