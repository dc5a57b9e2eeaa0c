"""Compiles for sm_90, with no GPU, every configuration of the Triton kernels; prints JSON rows.

The backend's own launchers run under a driver that claims a Hopper GPU and launches nothing, so
types, strides and their divisibility are those of a real call. It needs the real compiler: run it
without TRITON_INTERPRET, as test_triton_compile.py does. Another architecture: --sm, and what that
one's tables hold; --defaults compiles the first configuration of each kernel alone, as it runs
without a window or a soft cap.

    python -m tests.kernels.compile_for_sm90 bfloat16 64 128 --sm 86
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from tw_kernels.attention.triton import backward_kernels as bwd
from tw_kernels.attention.triton import forward_kernel as fwd
from tw_kernels.attention.triton.tuning import Candidates, candidates_for
from tw_kernels.trie import TrieLayout

NVIDIA_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compile_instead_of_launching(sm: int = 90) -> list[Any]:
    """From here on each launch compiles its kernel for sm_90, or another architecture, and appends
    it to the list."""
    compiled = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    JITFunction.run = compile_only
    driver: Any = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", sm, 32),
    )
    triton.runtime.driver.set_active(driver)
    return compiled


# Window and soft cap: with neither, and with both, which need the most registers.
VARIANTS = {"plain": (None, None), "window, softcap": (50, 30.0)}


def launches(
    dtype: torch.dtype, head_dim: int, variant: str, sm: int, defaults: bool
) -> Iterator[object]:
    """Launches each kernel with each of its candidates; yields the configuration, or None.

    defaults: with the first of them alone.
    """
    window, softcap = VARIANTS[variant]
    layout = TrieLayout(torch.full((200,), 200, dtype=torch.int32))
    ends = layout.subtree_ends
    q, k = torch.zeros(200, 8, head_dim, dtype=dtype), torch.zeros(200, 2, head_dim, dtype=dtype)
    mask = ends, None if window is None else layout.window_starts(window)
    lse2, delta = bwd.row_stats(q, q, torch.zeros(8, 200))
    yield None
    candidates = candidates_for(divmod(sm, 10), dtype, head_dim, variant != "plain")
    if defaults:
        candidates = Candidates(*(options[:1] for options in candidates))
    for config in candidates.forward:
        schedule = layout.block_schedule(config.block_q, config.block_kv, window)
        fwd.forward(q, k, k, *mask, schedule, 0.1, softcap, config)
        yield config
    for gradient, configs in ((bwd.grad_q, candidates.dq), (bwd.grad_kv, candidates.dkv)):
        for config in configs:
            schedule = layout.block_schedule(config.block_q, config.block_kv, window)
            gradient(q, q, k, k, lse2, delta, *mask, schedule, 0.1, softcap, config)
            yield config


def figures(kernel: Any) -> dict[str, int]:
    """Registers, memory in bytes and instruction counts of a compiled kernel, from its cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        commands = (["cuobjdump", "--dump-resource-usage"], ["nvdisasm", "-c"])
        usage, sass = (
            subprocess.run(
                [NVIDIA_BIN / name, flag, cubin.name], check=True, capture_output=True, text=True
            ).stdout
            for name, flag in commands
        )

    def resource(name: str) -> int:
        found = re.search(rf"\b{name}:(\d+)", usage)
        assert found, usage
        return int(found[1])

    def count(instruction: str) -> int:
        return len(re.findall(rf"\b{instruction}\b", sass))

    return {
        "registers": resource("REG"),
        "stack": resource("STACK"),
        "spills": count("LDL") + count("STL"),
        "shared": kernel.metadata.shared,
        "HGMMA": count("HGMMA"),
        "HMMA": count("HMMA"),
        "async_copies": count(r"LDGSTS\.E\.BYPASS\.128"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dtype")
    parser.add_argument("head_dims", nargs="+", type=int)
    parser.add_argument("--sm", type=int, default=90)
    parser.add_argument("--defaults", action="store_true")
    args = parser.parse_args()
    compiled = compile_instead_of_launching(args.sm)
    variants = ["plain"] if args.defaults else VARIANTS
    for head_dim, variant in itertools.product(args.head_dims, variants):
        dtype = getattr(torch, args.dtype)
        for config in launches(dtype, head_dim, variant, args.sm, args.defaults):
            kernel = compiled[-1]
            row = {"kernel": kernel.name, "head_dim": head_dim, "variant": variant}
            print(json.dumps(row | {"config": config} | figures(kernel)))


if __name__ == "__main__":
    main()
