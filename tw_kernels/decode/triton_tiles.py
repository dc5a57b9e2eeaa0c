"""Sizes that the partial kernel of trie_decode in Triton runs with."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from tw_kernels import triton_interpreter
from tw_kernels.decode.plan import DecodePlan, PagedKV


class Config(NamedTuple):
    """Sizes of the partial kernel. block_m: matrix rows of a program, at least 16."""

    block_m: int
    block_kv: int
    num_warps: int
    num_stages: int


class Launch(NamedTuple):
    """A launch of the partial kernel: for items of [least, most] matrix rows."""

    config: Config
    least: int
    most: int


EVERY = 2**31 - 1  # rows at most: no limit
NARROW, MIDDLE = 16, 64  # the fewest rows of a product; those of one warpgroup's on sm_90

# By bytes per element and the largest head dim they serve. A tile of keys is 16 or 32 KiB with its
# values, three in flight. Up to 64 rows two programs share a multiprocessor: one multiplies while
# the other waits for its pages. A wide item reads its keys once for 128 rows, two warpgroups.
# float32 multiplies outside the tensor cores, for exactness, and has tiles of one size.
NARROW_CONFIGS = {
    (2, 64): Config(NARROW, 128, 4, 3),
    (2, 128): Config(NARROW, 64, 4, 3),
    (2, 256): Config(NARROW, 32, 4, 3),
    (4, 64): Config(NARROW, 32, 4, 2),
    (4, 128): Config(NARROW, 16, 4, 2),
    (4, 256): Config(NARROW, 16, 4, 2),
}
MIDDLE_CONFIGS = {
    (2, 64): Config(MIDDLE, 128, 4, 3),
    (2, 128): Config(MIDDLE, 64, 4, 3),
    (2, 256): Config(MIDDLE, 32, 8, 3),
    (4, 64): Config(32, 32, 8, 2),
    (4, 128): Config(32, 16, 8, 2),
    (4, 256): Config(16, 16, 8, 2),
}
WIDE_CONFIGS = {
    (2, 64): Config(128, 128, 8, 3),
    (2, 128): Config(128, 64, 8, 3),
}


def launches_for(q: Tensor, kv: PagedKV, plan: DecodePlan) -> list[Launch]:
    """How the partial kernel runs; follows from shapes and capacity alone."""
    rows = matrix_rows(q, kv, plan)
    if triton_interpreter.is_on():
        narrow, wide = Config(16, 32, 4, 1), Config(32, 32, 4, 1)
        split = [Launch(narrow, 1, NARROW), Launch(wide, NARROW + 1, EVERY)]
        return split if rows > NARROW else [Launch(narrow, 1, EVERY)]
    head_dim = min(d for _, d in MIDDLE_CONFIGS if d >= q.shape[-1])
    key = q.dtype.itemsize, head_dim
    if rows <= NARROW:
        return [Launch(NARROW_CONFIGS[key], 1, EVERY)]
    if rows <= MIDDLE or key not in WIDE_CONFIGS:
        return [Launch(MIDDLE_CONFIGS[key], 1, EVERY)]
    return [Launch(WIDE_CONFIGS[key], MIDDLE + 1, EVERY), Launch(MIDDLE_CONFIGS[key], 1, MIDDLE)]


def matrix_rows(q: Tensor, kv: PagedKV, plan: DecodePlan) -> int:
    """Of the largest item that the plan has room for."""
    return min(plan.tile_rows, plan.capacity.rows) * (q.shape[1] // kv.k_pages.shape[2])
