"""What the CUDA driver is asked for, and what is said when it refuses (cuda_emulation.py)."""

import importlib.util
import os
import subprocess
import sys
from ctypes.util import find_library
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.kernels.cuda_emulation import DRIVER, STREAM, EmulatedGpu, decode, driver_folder
from tests.kernels.decode_batches import Batch, Inputs, fork_join_batch, random_inputs
from tw_kernels import DecodePlan
from tw_kernels.decode import cuda as cuda_decode
from tw_kernels.scores import NO_OPTIONS

ATTEND = "trie_decode_attend_bfloat16_64"
SHARED = 210 * 1024  # of ATTEND: two tiles of q, 12 of keys or values, and what goes with them


@pytest.fixture(scope="module")
def gpu():
    return EmulatedGpu()


def call(batch: Batch, heads: int = 8) -> tuple[Inputs, DecodePlan]:
    return random_inputs(batch, (heads, 2, 64), torch.bfloat16), batch.plan()


SMALL = fork_join_batch(prefix=32, suffix=5, prompts=1, threads=2, page_size=16)


def decode_of(cubin: str, inputs: Inputs, plan: DecodePlan) -> Tensor:
    """As `decode`, with the kernels of a file that no call before has loaded."""
    cuda_decode.CUBIN = Path(cubin)
    return decode(inputs, plan)


def test_a_call_launches_write_attend_and_merge_each_before_the_last_has_ended():
    gpu = EmulatedGpu()
    launches = [
        f"launch trie_decode_write on stream {STREAM}",  # after all that came before the call
        f"launch {ATTEND} on stream {STREAM}, early",
        f"launch trie_decode_merge_bfloat16_64 on stream {STREAM}, early",
    ]
    assert gpu.run(decode, *call(SMALL)).events == [
        *("retain 0", "push context", "load trie_decode.cubin", launches[0]),
        *(f"attribute 8 of {ATTEND} on 0: {SHARED}", *launches[1:], "pop"),
    ]
    # The second call finds the context, the kernels and their shared memory ready.
    assert gpu.run(decode, *call(SMALL)).events == ["push context", *launches, "pop"]


def test_nothing_is_written_if_the_pages_hold_the_new_tokens(gpu):
    inputs, plan = call(SMALL)
    before = inputs.kv.k_pages.nan_to_num(nan=7.0)
    assert torch.equal(gpu(pages_after, inputs, plan).nan_to_num(nan=7.0), before)


def pages_after(inputs: Inputs, plan: DecodePlan) -> Tensor:
    """The pages of keys after a call without new ones."""
    cuda_decode.forward(inputs.q, inputs.kv, plan, 0.1, None, None, NO_OPTIONS)
    return inputs.kv.k_pages


def test_an_empty_step_launches_nothing(gpu):
    inputs = call(SMALL)[0]
    empty = inputs.q[:0], inputs.kv, Batch([], [], [], 16, 1).plan(), 0.1, None, None, NO_OPTIONS
    assert gpu.run(cuda_decode.forward, *empty).events == ["push context", "pop"]


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        ("cuDeviceGet", "cuDeviceGet: CUDA_ERROR_INVALID_VALUE (invalid argument)"),
        ("cuLibraryLoadFromFile", "cuLibraryLoadFromFile of fails-to-load: CUDA_ERROR"),
        ("cuLibraryGetKernel", "cuLibraryGetKernel of trie_decode_write: CUDA_ERROR"),
        ("cuTensorMapEncodeTiled", "cuTensorMapEncodeTiled: CUDA_ERROR"),
        ("cuLaunchKernelEx", "cuLaunchKernelEx of trie_decode_write: CUDA_ERROR_INVALID_VALUE"),
    ],
)
def test_what_the_driver_refuses_is_told_with_its_own_words(gpu, fails, message):
    cubin = "fails-to-load" if fails == "cuLibraryLoadFromFile" else f"{fails}.cubin"
    ran = gpu.run(decode_of, cubin, *call(SMALL), fails=fails)
    assert ran.failure.startswith(message)
    assert ran.events.count("push context") == ran.events.count("pop")


def driver_missing(folder: Path, fails: str = "") -> str:
    """What _C says in a process of its own, without torch, with a libcuda.so.1 of this folder."""
    extension = importlib.util.find_spec("tw_kernels._C")
    assert extension and extension.origin
    code = (
        "import importlib.util as u, sys; s = u.spec_from_file_location('_C', sys.argv[1]);"
        "m = u.module_from_spec(s); s.loader.exec_module(m); print(m.cuda_driver_missing())"
    )
    return subprocess.run(
        [sys.executable, "-c", code, extension.origin],
        env=os.environ | {"LD_LIBRARY_PATH": str(folder), "FAKE_CUDA_FAILS": fails},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        ("", ""),
        ("cuInit", "cuInit: CUDA_ERROR_INVALID_VALUE (invalid argument)"),
        ("no device", "the CUDA driver sees no device"),
    ],
)
def test_a_driver_says_whether_it_has_a_device(fails, message):
    assert driver_missing(driver_folder(*DRIVER), fails) == message


def test_a_driver_too_old_is_told_from_one_that_is_missing(tmp_path):
    (tmp_path / "empty.cpp").touch()
    folder = driver_folder(str(tmp_path / "empty.cpp"))
    assert driver_missing(folder) == "the CUDA driver has no cuInit: CUDA 12 or later is needed"


@pytest.mark.skipif(find_library("cuda") is not None, reason="this machine has a CUDA driver")
def test_a_machine_without_a_driver_is_told_so(tmp_path):
    assert driver_missing(tmp_path).startswith("no CUDA driver: libcuda.so.1")
