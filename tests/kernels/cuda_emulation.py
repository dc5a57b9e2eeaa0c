"""The CUDA kernels without a GPU: the library's own calls, against a driver that emulates them.

fake_cuda_driver.cpp is a libcuda.so.1 whose launches run on the CPU, over the arguments, grids and
tensor maps that a GPU would get and the index functions of csrc/cuda. A process loads one libcuda
only, so the calls run in a process of their own.
"""

import ctypes
import math
import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.kernels.cubins import CACHE
from tests.kernels.decode_batches import Inputs
from tw_kernels import DecodePlan, TrieLayout, cuda_build, cuda_device
from tw_kernels.attention import cuda as cuda_attention
from tw_kernels.cuda_build import digest
from tw_kernels.decode import cuda as cuda_decode
from tw_kernels.scores import NO_OPTIONS

STREAM = 77
DRIVER = ("fake_cuda_driver.cpp", "cuda_attention_emulation.cpp", "cuda_decode_emulation.cpp")


def driver_folder(*names: str) -> Path:
    """Where a libcuda.so.1 of these sources of tests/kernels lies."""
    sources = [Path(__file__).parent / name for name in names]
    folder = CACHE / f"driver-{digest(sources[0], *map(digest, sources[1:]))}"
    if not (folder / "libcuda.so.1").exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / str(os.getpid())  # tests run in several processes
        flags = ["-std=c++17", "-O3", "-shared", "-fPIC", f"-I{cuda_build.SOURCES}"]
        subprocess.run(["c++", *flags, "-o", part, *sources], check=True)
        part.rename(folder / "libcuda.so.1")
    return folder


class Ran(NamedTuple):
    result: Any
    events: list[str]  # what the driver was asked to do
    failure: str  # the RuntimeError's message, if there was one


class EmulatedGpu:
    """Runs functions of test modules in a process that has the driver."""

    def __init__(self):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LD_LIBRARY_PATH", str(driver_folder(*DRIVER)))
            self.pool = ProcessPoolExecutor(1, get_context("spawn"), _pretend_a_gpu)
            self.pool.submit(os.getpid).result()  # the process starts with the first call

    def run(self, function: Callable, *args: Any, fails: str = "") -> Ran:
        """`fails`: the call that the driver refuses."""
        return self.pool.submit(_run, function, args, fails).result()

    def __call__(self, function: Callable, *args: Any) -> Any:
        """The result of a call that the driver takes."""
        ran = self.run(function, *args)
        assert ran.failure == "", "\n".join([*ran.events, ran.failure])
        return ran.result


# FINE_COST at which all kernels are of that grain.
GRAINS = {"coarse": math.inf, "fine": 0.0}


def attention(
    subtree_ends: Tensor,
    tensors: list[Tensor],
    scale: float,
    grain: str = "coarse",
    multiprocessors: int = 3,
) -> list[Tensor]:
    """out, lse, dq, dk, dv of q, k, v, dout. Runs in the process of an EmulatedGpu."""
    _pretend_multiprocessors(multiprocessors)
    cuda_attention.FINE_COST = GRAINS[grain]
    q, k, v, dout = tensors
    plan = cuda_attention.plan(TrieLayout(subtree_ends), q)
    out, lse = cuda_attention.forward(q, k, v, plan, scale)
    return [out, lse, *cuda_attention.backward(dout, q, k, v, out, lse, plan, scale)]


def decode(inputs: Inputs, plan: DecodePlan, multiprocessors: int = 3) -> Tensor:
    """out of a call, which gets pages of its own. Runs in the process of an EmulatedGpu."""
    _pretend_multiprocessors(multiprocessors)
    scale = inputs.q.shape[-1] ** -0.5
    x = inputs.copy()
    return cuda_decode.forward(x.q, x.kv, plan, scale, x.new_k, x.new_v, NO_OPTIONS)


def _pretend_multiprocessors(count: int) -> None:
    properties = SimpleNamespace(multi_processor_count=count)
    torch.cuda.get_device_properties = lambda device: properties


def _pretend_a_gpu() -> None:
    torch.set_num_threads(1)
    _pretend_multiprocessors(3)
    torch.use_deterministic_algorithms(True)  # new tensors hold NaN
    cuda_device.place = lambda q, cubin: (0, STREAM, cubin.name)


def _run(function: Callable, args: tuple, fails: str) -> Ran:
    os.environ["FAKE_CUDA_FAILS"] = fails
    driver = ctypes.CDLL("libcuda.so.1")
    driver.fake_cuda_events.restype = ctypes.c_char_p
    try:
        result, failure = function(*args), ""
    except RuntimeError as error:
        result, failure = None, str(error)
    return Ran(result, driver.fake_cuda_events().decode().splitlines(), failure)
