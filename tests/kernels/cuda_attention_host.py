"""The host's half of the CUDA trie attention kernels as a library, with the emulation beside it.

Structures are those of csrc/cuda/trie_attention.h and driver.h.
"""

import ctypes
from ctypes import c_char_p, c_float, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from tests.kernels.cuda_decode_host import compiled_library
from tw_kernels import TrieLayout, cuda_build
from tw_kernels.attention import cuda as cuda_attention


class Heads(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("row_stride", c_int64), ("head_stride", c_int64)]

    @classmethod
    def of(cls, x: Tensor) -> "Heads":
        return cls(*cuda_attention._strided(x))


class RowSchedule(ctypes.Structure):
    _fields_ = [(name, c_void_p) for name in ("row_ptr", "full_end", "kv_blocks", "order")]


class ColumnSchedule(ctypes.Structure):
    _fields_ = [(name, c_void_p) for name in ("q_range", "order")]


class TrieAttentionArgs(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("tokens", "heads", "kv_heads", "head_dim")),
        ("multiprocessors", c_int64),
        ("scale", c_float),
        ("ends", c_void_p),
        *((name, Heads) for name in ("q", "k", "v", "out")),
        ("lse", c_void_p),
        ("rows", RowSchedule),
        ("columns", ColumnSchedule),
        *((name, Heads) for name in ("dout", "dq", "dk", "dv")),
        ("lse2", c_void_p),
        ("delta", c_void_p),
    ]


def library_file() -> Path:
    cuda = cuda_build.SOURCES / "cuda"
    return compiled_library(
        Path(__file__).with_name("cuda_attention_emulation.cpp"),
        cuda / "trie_attention.cpp",
        cuda / "driver.cpp",
    )


def library() -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(library_file()))
    for name in (
        "emulate_trie_attention_forward",
        "emulate_trie_attention_backward",
        "why_not_tiles",
    ):
        getattr(loaded, name).restype = c_char_p
    return loaded


def streams(loaded: ctypes.CDLL, head_dim: int) -> list[tuple[int, int]]:
    """(rows of a tile, stages) of forward, dQ, and dK with dV."""
    found = ((ctypes.c_int * 2) * 3)()
    loaded.streams_of(head_dim, found)
    return [(rows, stages) for rows, stages in found]


class Emulator:
    """Runs calls as the kernels would, in double precision; results are not rounded to bfloat16."""

    def __init__(self, multiprocessors: int):
        self.multiprocessors = multiprocessors
        self.library = library()

    def arguments(
        self, q: Tensor, k: Tensor, v: Tensor, plan: cuda_attention.Plan, scale: float
    ) -> TrieAttentionArgs:
        """What both passes take, but for their schedules and results."""
        n, heads, head_dim = q.shape
        args = TrieAttentionArgs(n, heads, k.shape[1], head_dim, self.multiprocessors, scale)
        args.ends = plan.ends.data_ptr()
        args.q, args.k, args.v = (Heads.of(x) for x in (q, k, v))
        return args

    def forward(
        self, layout: TrieLayout, q: Tensor, k: Tensor, v: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """out [N, Hq, D] and lse [Hq, N], float64."""
        plan = cuda_attention.plan(layout, q)
        args = self.arguments(q, k, v, plan, scale)
        args.rows = RowSchedule(*cuda_attention._rows(plan.forward))
        out = torch.full(q.shape, torch.nan, dtype=torch.float64)
        lse = torch.full((q.shape[1], q.shape[0]), torch.nan, dtype=torch.float64)
        as_bfloat16 = torch.empty_like(q, memory_format=torch.contiguous_format)
        args.out = Heads.of(as_bfloat16)
        _check(self.library.emulate_trie_attention_forward(ctypes.byref(args), *_doubles(out, lse)))
        return out, lse

    def backward(
        self,
        layout: TrieLayout,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
    ) -> list[Tensor]:
        """dq, dk, dv in float64; out bfloat16, lse float32."""
        plan = cuda_attention.plan(layout, q)
        args = self.arguments(q, k, v, plan, scale)
        args.rows = RowSchedule(*cuda_attention._rows(plan.dq))
        args.columns = ColumnSchedule(*cuda_attention._columns(plan.dkv))
        lse2, delta = torch.full((2, q.shape[1], plan.ends.numel()), torch.nan)
        args.lse, args.lse2, args.delta = lse.data_ptr(), lse2.data_ptr(), delta.data_ptr()
        args.out, args.dout = Heads.of(out), Heads.of(dout)
        as_bfloat16 = [torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v)]
        args.dq, args.dk, args.dv = (Heads.of(x) for x in as_bfloat16)
        grads = [torch.full(x.shape, torch.nan, dtype=torch.float64) for x in (q, k, v)]
        _check(self.library.emulate_trie_attention_backward(ctypes.byref(args), *_doubles(*grads)))
        return grads


def _doubles(*tensors: Tensor) -> list[c_void_p]:
    return [c_void_p(x.data_ptr()) for x in tensors]


def _check(failure: bytes | None) -> None:
    assert failure is None, failure.decode()
