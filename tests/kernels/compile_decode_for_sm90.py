"""Compiles for sm_90, with no GPU, every configuration of the decode kernels; prints JSON rows.

As compile_for_sm90.py, whose driver and figures it uses; run it without TRITON_INTERPRET. --sm is
another architecture.

    python -m tests.kernels.compile_decode_for_sm90 bfloat16 64 128
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator

import torch

from tests.kernels.compile_for_sm90 import compile_instead_of_launching, figures
from tw_kernels import DecodePlan, PagedKV
from tw_kernels.decode import triton_kernels as kernels
from tw_kernels.decode.triton_tiles import launches_for
from tw_kernels.scores import NO_OPTIONS, ScoreOptions

# Window, soft cap and sinks: with none of them, and with all.
VARIANTS = {
    "plain": NO_OPTIONS,
    "window, softcap, sinks": ScoreOptions(50, 30.0, torch.zeros(8)),
}
CALLS = [(16, "plain"), (64, "plain"), (16, "window, softcap, sinks")]  # page size, variant


def launches(dtype: torch.dtype, head_dim: int, page_size: int, variant: str) -> Iterator[object]:
    """Launches every kernel, partial for each kind of items; yields what tells the launches apart.

    All for 8 query heads on 2 KV heads, one sequence of one new token (narrow) or 32 (wide).
    """
    pages = torch.zeros(4, page_size, 2, head_dim, dtype=dtype)
    kv = PagedKV(pages, pages.clone())
    for new in (1, 32):
        plan = DecodePlan.build([[0, 1, 2, 3]], [3 * page_size], [new], page_size)
        q = torch.zeros(new, 8, head_dim, dtype=dtype)
        new_kv = torch.zeros(new, 2, head_dim, dtype=dtype)
        out, lse = kernels.partial(q, kv, plan, 0.1, VARIANTS[variant])
        yield from [launch.config for launch in launches_for(q, kv, plan)]
        if new > 1:
            continue
        kernels.write(kv, plan, new_kv, new_kv)
        yield None
        kernels.merge(plan, out, lse, VARIANTS[variant], q)
        yield None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dtype")
    parser.add_argument("head_dims", nargs="+", type=int)
    parser.add_argument("--sm", type=int, default=90)
    args = parser.parse_args()
    compiled = compile_instead_of_launching(args.sm)
    for head_dim in args.head_dims:
        for page_size, variant in CALLS:
            first = len(compiled)
            configs = list(launches(getattr(torch, args.dtype), head_dim, page_size, variant))
            for kernel, config in zip(compiled[first:], configs, strict=True):
                row = {
                    "kernel": kernel.name,
                    "head_dim": head_dim,
                    "page_size": page_size,
                    "variant": variant,
                    "config": config,
                }
                print(json.dumps(row | figures(kernel)), flush=True)


if __name__ == "__main__":
    main()
