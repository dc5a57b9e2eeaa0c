"""What a decode call asks of the CUDA driver: against one that only prints what it is asked."""

import os
import shutil
import subprocess
import sys
from ctypes.util import find_library
from pathlib import Path

import pytest

from tests.kernels import cuda_decode_host
from tests.kernels.cuda_decode_host import Pages, Rows, TrieDecodeArgs

# Two calls in a process that has not loaded a real driver.
CALLS = """
import ctypes, sys
host = ctypes.CDLL(sys.argv[1])
host.run_trie_decode.restype = ctypes.c_char_p
args = bytes.fromhex(sys.argv[2])
for _ in range(2):
    failure = host.run_trie_decode(args, 0, ctypes.c_void_p(77), b"trie_decode.cubin")
    if failure:
        sys.exit(failure.decode())
"""


@pytest.fixture(scope="module")
def driver_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("driver")
    source = Path(__file__).with_name("fake_cuda_driver.cpp")
    shutil.copy(cuda_decode_host.compiled_library(source), folder / "libcuda.so.1")
    return folder


def call(**change) -> TrieDecodeArgs:
    """Of a plan with room for 40 rows, 9 items and 90 partial results; 8 heads on 2 KV heads."""
    args = TrieDecodeArgs(
        *(40, 9, 90, 64, 8, 2, 128, 1000, 16), 9, 0.1,
        *range(1, 8), Rows(4096, 1024, 128), Rows(4096, 256, 128), Rows(4096, 256, 128),
        Pages(1 << 20, 1 << 21, 4096, 256, 128),
    )  # fmt: skip
    for name, value in change.items():
        setattr(args, name, value)
    return args


def asked(folder: Path, args: TrieDecodeArgs, fails: str = "") -> tuple[list[str], str]:
    """Lines of the driver, and why the call failed."""
    done = subprocess.run(
        [sys.executable, "-c", CALLS, str(cuda_decode_host.library_file()), bytes(args).hex()],
        env=os.environ | {"LD_LIBRARY_PATH": str(folder), "FAKE_CUDA_FAILS": fails},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.splitlines(), done.stderr.strip()


def test_a_call_launches_write_partial_and_merge_on_the_callers_stream(driver_folder):
    lines, failure = asked(driver_folder, call())
    assert failure == ""
    # 40 rows x 4 heads of a group are 160 matrix rows: two blocks of two warpgroups.
    shared = 14 * 16384 + 2 * 8 * 12
    sizes = "128/0/64/1 2/256/1/1 16/512/16/1 1000/8192/1/1"
    maps = [f"map type 9 swizzle 3 at {at}: {sizes}" for at in (1 << 20, 1 << 21)]
    partial = "trie_decode_partial_bfloat16_128_2"
    launches = [
        "launch trie_decode_write: 40 blocks of 128 threads, 0 bytes, stream 77",
        f"launch {partial}: {9 * 2 * 2} blocks of 288 threads, {shared} bytes, stream 77",
        f"launch trie_decode_merge_bfloat16_128: {40 * 8 // 4} blocks of 128 threads, 0 bytes, "
        "stream 77",
    ]
    first = ["retain 0", "push context", "load trie_decode.cubin", launches[0], *maps]
    first += [f"attribute 8 of {partial} on 0: {shared}", *launches[1:], "pop"]
    # The second call finds the context, the kernels and their shared memory ready.
    second = ["push context", launches[0], *maps, *launches[1:], "pop"]
    assert lines == first + second


@pytest.mark.parametrize(("rows", "warpgroups", "blocks"), [(16, 1, 1), (17, 2, 1), (33, 2, 2)])
def test_two_warpgroups_share_the_keys_of_more_than_64_matrix_rows(
    driver_folder, rows, warpgroups, blocks
):
    lines, _ = asked(driver_folder, call(rows=rows, element=6, head_dim=64))
    name = f"trie_decode_partial_float16_64_{warpgroups}"
    launch = next(line for line in lines if line.startswith(f"launch {name}:"))
    assert f": {9 * 2 * blocks} blocks of {warpgroups * 128 + 32} threads" in launch


def test_rows_of_an_item_bound_the_blocks(driver_folder):
    lines, _ = asked(driver_folder, call(rows=1000, tile_rows=16))
    launch = next(line for line in lines if "partial" in line and line.startswith("launch"))
    assert "partial_bfloat16_128_1: 18 blocks of 160 threads" in launch


def test_nothing_is_written_if_the_pages_hold_the_new_tokens(driver_folder):
    lines, _ = asked(driver_folder, call(new_k=Rows(), new_v=Rows()))
    assert not any("write" in line for line in lines)


def test_an_empty_step_launches_nothing(driver_folder):
    lines, _ = asked(driver_folder, call(rows=0))
    assert not any(line.startswith(("launch", "load", "map")) for line in lines)


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        ("cuInit", "cuInit: CUDA_ERROR_INVALID_VALUE (invalid argument)"),
        ("no device", "the CUDA driver sees no device"),
        ("cuDeviceGet", "cuDeviceGet: CUDA_ERROR_INVALID_VALUE"),
        ("cuLibraryLoadFromFile", "cuLibraryLoadFromFile of trie_decode.cubin: CUDA_ERROR"),
        ("cuLibraryGetKernel", "cuLibraryGetKernel of trie_decode_write: CUDA_ERROR"),
        ("cuTensorMapEncodeTiled", "cuTensorMapEncodeTiled: CUDA_ERROR"),
        ("cuLaunchKernel", "cuLaunchKernel of trie_decode_write: CUDA_ERROR_INVALID_VALUE"),
    ],
)
def test_what_the_driver_refuses_is_told_with_its_own_words(driver_folder, fails, message):
    lines, failure = asked(driver_folder, call(), fails)
    assert failure.startswith(message)
    assert lines.count("push context") == lines.count("pop")


def test_a_driver_too_old_is_told_from_one_that_is_missing(driver_folder, tmp_path):
    empty = tmp_path / "empty.cpp"
    empty.touch()
    shutil.copy(cuda_decode_host.compiled_library(empty), tmp_path / "libcuda.so.1")
    _, failure = asked(tmp_path, call())
    assert failure == "the CUDA driver has no cuInit: CUDA 12 or later is needed"


@pytest.mark.skipif(find_library("cuda") is not None, reason="this machine has a CUDA driver")
def test_a_machine_without_a_driver_is_told_so(tmp_path):
    _, failure = asked(tmp_path, call())
    assert failure.startswith("no CUDA driver: libcuda.so.1")
