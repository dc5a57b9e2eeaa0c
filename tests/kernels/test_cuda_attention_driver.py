"""What a trie attention call asks of the CUDA driver: against one that only prints it."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels import cuda_attention_host
from tests.kernels.cuda_attention_host import Heads, TrieAttentionArgs
from tests.kernels.cuda_decode_host import compiled_library

# Forward and backward in a process that has not loaded a real driver.
CALLS = """
import ctypes, sys
host = ctypes.CDLL(sys.argv[1])
host.run_trie_attention.restype = ctypes.c_char_p
failure = host.run_trie_attention(bytes.fromhex(sys.argv[2]), 0, ctypes.c_void_p(77))
sys.exit(failure and failure.decode())
"""


@pytest.fixture(scope="module")
def driver_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("driver")
    source = Path(__file__).with_name("fake_cuda_driver.cpp")
    shutil.copy(compiled_library(source), folder / "libcuda.so.1")
    return folder


def call(head_dim: int, multiprocessors: int) -> TrieAttentionArgs:
    """300 tokens, 6 heads on 2 KV heads; q, k and v of one projection; tensors at 1, 2, ... MiB."""
    args = TrieAttentionArgs(300, 6, 2, head_dim, multiprocessors, 0.1)
    for mebibytes, name in enumerate(("q", "k", "v", "out", "dout", "dq", "dk", "dv"), 1):
        heads = 10 if name in "qkv" else 2 if name in ("dk", "dv") else 6
        setattr(args, name, Heads(mebibytes << 20, heads * head_dim, head_dim))
    return args


def asked(folder: Path, args: TrieAttentionArgs, fails: str = "") -> tuple[list[str], str]:
    """Lines of the driver, and why the call failed."""
    file = cuda_attention_host.library_file()
    done = subprocess.run(
        [sys.executable, "-c", CALLS, str(file), bytes(args).hex()],
        env=os.environ | {"LD_LIBRARY_PATH": str(folder), "FAKE_CUDA_FAILS": fails},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.splitlines(), done.stderr.strip()


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("multiprocessors", [4, 132])
def test_a_call_launches_each_kernel_on_the_callers_stream(
    driver_folder, head_dim, multiprocessors
):
    args = call(head_dim, multiprocessors)
    lines, failure = asked(driver_folder, args)
    assert failure == ""
    shared = (ctypes.c_int * 3)()
    cuda_attention_host.library().shared_bytes_of(ctypes.byref(args), shared)
    # 300 tokens are 3 blocks of 128, padded to 384; delta takes 256 * 8 elements a block.
    grids = {
        "forward": (min(3 * 6, multiprocessors), 384, shared[0]),
        "delta": (6 * 384 * head_dim // 2048, 256, 0),
        "dq": (min(3 * 6, multiprocessors), 384, shared[1]),
        "dkv": (min(3 * 2, multiprocessors), 384, shared[2]),
    }
    assert [line for line in lines if line.startswith("launch")] == [
        f"launch trie_attention_{name}_{head_dim}: {blocks} blocks of {threads} threads, "
        f"{shared} bytes, stream 77"
        for name, (blocks, threads, shared) in grids.items()
    ]
    assert lines.count("push context") == lines.count("pop") == 2
    assert [line for line in lines if line.startswith("load")] == [
        "load fwd.cubin",
        "load bwd.cubin",
    ]


@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_tensor_is_mapped_in_the_tiles_that_its_kernel_takes(driver_folder, head_dim):
    lines, _ = asked(driver_folder, call(head_dim, 132))
    streams = cuda_attention_host.streams(cuda_attention_host.library(), head_dim)
    (forward, _), (dq, _), (dkv, _) = streams

    def tiles(mebibytes: int, heads: int, row_stride: int, rows: int) -> str:
        sizes = f"{head_dim}/0/64/1 {heads}/{head_dim * 2}/1/1 300/{row_stride * head_dim * 2}"
        return f"map type 9 swizzle 3 at {mebibytes << 20}: {sizes}/{rows}/1"

    own = 64  # rows of a warpgroup
    assert [line for line in lines if line.startswith("map")] == [
        tiles(1, 6, 10, own), tiles(4, 6, 6, own), tiles(2, 2, 10, forward),
        tiles(3, 2, 10, forward),  # forward: q, out, k, v
        tiles(1, 6, 10, own), tiles(5, 6, 6, own), tiles(2, 2, 10, dq), tiles(3, 2, 10, dq),
        tiles(6, 6, 6, own),  # dq: q, dout, k, v, dq
        tiles(2, 2, 10, own), tiles(3, 2, 10, own), tiles(1, 6, 10, dkv), tiles(5, 6, 6, dkv),
        tiles(7, 2, 2, own), tiles(8, 2, 2, own),  # dkv: k, v, q, dout, dk, dv
    ]  # fmt: skip


def test_what_the_driver_refuses_is_told_with_its_own_words(driver_folder):
    lines, failure = asked(driver_folder, call(64, 132), fails="cuLaunchKernel")
    assert failure.startswith("cuLaunchKernel of trie_attention_forward_64: CUDA_ERROR")
    assert lines.count("push context") == lines.count("pop") == 1
