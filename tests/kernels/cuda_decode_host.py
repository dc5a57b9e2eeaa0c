"""The host's half of the CUDA decode kernels as a library of its own, with the emulation beside it.

Structures are those of csrc/cuda/trie_decode.h and driver.h.
"""

import ctypes
import os
import subprocess
from ctypes import c_char_p, c_float, c_int, c_int64, c_uint32, c_uint64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from tests.kernels.cubins import CACHE, digest
from tests.kernels.decode_batches import Inputs
from tw_kernels import DecodePlan, cuda_build

ELEMENTS = {torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}  # Element of driver.h


class Rows(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("row_stride", c_int64), ("head_stride", c_int64)]

    @classmethod
    def of(cls, x: Tensor) -> "Rows":
        assert x.stride(2) == 1
        return cls(x.data_ptr(), x.stride(0), x.stride(1))


class Pages(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("k", "v")),
        *((name, c_int64) for name in ("page_stride", "slot_stride", "head_stride")),
    ]


class TrieDecodeArgs(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("rows", "num_items", "partial_slots", "tile_rows")),
        *((name, c_int64) for name in ("heads", "kv_heads", "head_dim", "num_pages", "page_size")),
        ("element", c_int),
        ("scale", c_float),
        *((name, c_void_p) for name in ("caller_rows", "positions", "slots", "merge_ptr")),
        *((name, c_void_p) for name in ("merge_slots", "pages", "items")),
        *((name, Rows) for name in ("q", "new_k", "new_v")),
        ("kv", Pages),
        *((name, c_void_p) for name in ("out", "partial_out", "partial_lse")),
    ]


class Tiles(ctypes.Structure):
    _fields_ = [
        *((name, c_int) for name in ("element", "swizzle", "rank")),
        ("address", c_uint64),
        ("sizes", c_uint64 * 5),
        ("strides", c_uint64 * 5),
        ("box", c_uint32 * 5),
    ]


def library() -> ctypes.CDLL:
    """Compiled once for a state of its sources."""
    loaded = ctypes.CDLL(str(library_file()))
    for name in (
        *("emulate_trie_decode", "emulate_ring", "run_trie_decode"),
        *("why_not_trie_decode", "why_not_tiles"),
    ):
        getattr(loaded, name).restype = c_char_p
    return loaded


def library_file() -> Path:
    host = (cuda_build.SOURCES / "cuda" / name for name in ("trie_decode.cpp", "driver.cpp"))
    return compiled_library(Path(__file__).with_name("cuda_decode_emulation.cpp"), *host)


def compiled_library(*sources: Path) -> Path:
    """A shared library of these C++ sources, under the first one's name."""
    file = CACHE / f"{sources[0].stem}-{digest(sources[0], *map(digest, sources[1:]))}.so"
    if not file.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")  # tests run in several processes
        flags = ["-std=c++17", "-O2", "-shared", "-fPIC", f"-I{cuda_build.SOURCES}"]
        subprocess.run(["c++", *flags, "-o", part, *sources, "-ldl"], check=True)
        part.rename(file)
    return file


def arguments(inputs: Inputs, plan: DecodePlan) -> TrieDecodeArgs:
    """Of a call, but for its results."""
    kv = inputs.kv
    num_pages, page_size, kv_heads, head_dim = kv.k_pages.shape
    return TrieDecodeArgs(
        *(plan.capacity.rows, plan.capacity.items, plan.capacity.slots, plan.tile_rows),
        *(inputs.q.shape[1], kv_heads, head_dim, num_pages, page_size),
        ELEMENTS[inputs.q.dtype],
        head_dim**-0.5,
        *(x.data_ptr() for x in (plan.rows, plan.positions, plan.slots, plan.merge_ptr)),
        *(x.data_ptr() for x in (plan.merge_slots, plan.pages, plan.items)),
        *(Rows.of(x) for x in (inputs.q, inputs.new_k, inputs.new_v)),
        Pages(kv.k_pages.data_ptr(), kv.v_pages.data_ptr(), *kv.k_pages.stride()[:3]),
    )
