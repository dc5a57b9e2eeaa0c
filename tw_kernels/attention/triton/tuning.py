"""Block sizes, warps and pipeline stages of the Triton kernels.

Each kernel has a few candidates, which depend on the products that a GPU has. On a GPU they are
timed once per device model, head dim and dtype, on one fixed trie, and the fastest is kept while
the process lives; TW_AUTOTUNE=0 takes the first of each instead. With a window, a soft cap or both,
which change what a kernel does and the registers it needs, they are timed anew. The interpreter
always runs INTERPRETED.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import NamedTuple, cast

import torch
import triton
import triton.testing
from torch import Tensor

from tw_kernels import triton_interpreter
from tw_kernels.attention.triton import backward_kernels as bwd
from tw_kernels.attention.triton import forward_kernel as fwd
from tw_kernels.attention.triton.forward_kernel import Config
from tw_kernels.trie import TrieLayout


class Configs(NamedTuple):
    """What each kernel runs with."""

    forward: Config
    dq: Config
    dkv: Config


# Unequal on purpose: a schedule used for the wrong kernel, or with its sides swapped, shows.
INTERPRETED = Configs(Config(32, 16, 4, 1, 1), Config(16, 32, 4, 1, 1), Config(32, 32, 4, 1, 1))


class Candidates(NamedTuple):
    """Configurations to choose from, the default first."""

    forward: tuple[Config, ...]
    dq: tuple[Config, ...]
    dkv: tuple[Config, ...]


# By bytes per element and the largest head dim they serve.
Table = dict[tuple[int, int], Candidates]

# On every GPU: float32 multiplies outside the tensor cores, for exactness. These fit, but at head
# dim 128, and at 256 with a window, registers spill.
FLOAT32: Table = {
    (4, 64): Candidates(*[(Config(32, 32, 8, 2, 1),)] * 3),
    (4, 128): Candidates(*[(Config(16, 32, 8, 2, 1),)] * 3),
    (4, 256): Candidates(*[(Config(16, 16, 8, 1, 1),)] * 3),
}

# Compute capabilities 9.0 to 11.x, whose products read a tile from shared memory, of which a block
# has 227 KiB. Up to head dim 128 none spills a register when compiled for sm_90
# (test_triton_compile.py).
WARPGROUP: Table = FLOAT32 | {
    (2, 64): Candidates(
        forward=(Config(128, 64, 4, 3, 1), Config(128, 128, 8, 3, 1), Config(64, 64, 4, 3, 2)),
        dq=(Config(128, 64, 8, 3, 2), Config(128, 32, 4, 3, 1), Config(64, 64, 4, 3, 2)),
        dkv=(Config(64, 128, 8, 3, 2), Config(128, 128, 8, 2, 1), Config(64, 64, 4, 3, 2)),
    ),
    (2, 128): Candidates(
        forward=(Config(128, 64, 8, 3, 2), Config(128, 128, 8, 2, 1), Config(64, 64, 4, 3, 1)),
        dq=(Config(128, 64, 8, 3, 2), Config(128, 128, 8, 2, 1), Config(64, 64, 4, 3, 1)),
        dkv=(Config(64, 128, 8, 3, 1), Config(32, 128, 8, 3, 2), Config(32, 64, 4, 3, 1)),
    ),
    (2, 256): Candidates(
        forward=(Config(64, 32, 4, 3, 1), Config(128, 32, 8, 2, 1)),
        dq=(Config(128, 32, 8, 2, 1),),
        dkv=(Config(32, 64, 8, 2, 1), Config(32, 32, 8, 2, 1)),
    ),
}


# With a window or a soft cap, which take registers of their own; none of these spills with both.
WARPGROUP_VARIANTS: Table = WARPGROUP | {
    (2, 64): Candidates(
        forward=(Config(128, 64, 8, 3, 1), Config(64, 64, 4, 3, 2)),
        dq=(Config(128, 64, 8, 3, 2), Config(128, 32, 4, 3, 1)),
        dkv=(Config(64, 128, 8, 3, 2), Config(64, 64, 4, 3, 2)),
    ),
    (2, 128): Candidates(
        forward=(Config(128, 64, 8, 3, 2), Config(64, 64, 4, 3, 1)),
        dq=(Config(128, 64, 8, 3, 2),),
        dkv=(Config(32, 128, 8, 3, 2),),
    ),
}

# All other compute capabilities: 8.x, and 12.x, whose products read registers (mma.sync). Operands
# take those of a thread before shared memory runs out. So what spills nothing, with a window and a
# soft cap too, fits in the 99 KiB that a block has on 8.6, 8.9 and 12.x; the same tiles serve an
# A100, which has 163. None was timed on such a GPU; test_triton_compile_other_gpus.py has what the
# compiler says.
WARP: Table = FLOAT32 | {
    (2, 64): Candidates(
        forward=(Config(128, 64, 8, 3, 1), Config(64, 64, 4, 3, 1)),
        dq=(Config(128, 32, 8, 3, 1), Config(64, 32, 4, 3, 1)),
        dkv=(Config(32, 64, 4, 3, 1),),
    ),
    (2, 128): Candidates(
        forward=(Config(128, 32, 8, 3, 1), Config(64, 32, 4, 3, 1)),
        dq=(Config(64, 64, 8, 2, 1), Config(64, 32, 8, 2, 1)),
        dkv=(Config(32, 64, 8, 2, 1),),
    ),
    (2, 256): Candidates(
        forward=(Config(64, 32, 8, 2, 1), Config(32, 32, 4, 2, 1)),
        dq=(Config(32, 32, 8, 2, 1),),
        dkv=(Config(32, 32, 8, 1, 1),),
    ),
}

# What is timed with.
WINDOW, SOFTCAP = 1024, 50.0


def has_warpgroup_products(capability: tuple[int, int]) -> bool:
    """Whether products read their operands from shared memory (wgmma, tcgen05), not registers."""
    return 9 <= capability[0] <= 11


def candidates_for(
    capability: tuple[int, int], dtype: torch.dtype, head_dim: int, variant: bool = False
) -> Candidates:
    """Those of the smallest head dim in the table that is not below this one.

    variant: whether there is a window or a soft cap.
    """
    table = WARP
    if has_warpgroup_products(capability):
        table = WARPGROUP_VARIANTS if variant else WARPGROUP
    largest = min(d for _, d in table if d >= head_dim)
    return table[dtype.itemsize, largest]


def configs_for(q: Tensor, window: int | None = None, softcap: float | None = None) -> Configs:
    """The configurations that calls with this q [N, Hq, D] run with in this process."""
    if triton_interpreter.is_on():
        return INTERPRETED
    has = window is not None, softcap is not None
    if os.environ.get("TW_AUTOTUNE") == "0":
        capability = torch.cuda.get_device_capability(q.device)
        options = candidates_for(capability, q.dtype, q.shape[-1], any(has))
        return Configs(*(of_kernel[0] for of_kernel in options))
    with torch.cuda.device(q.device):
        return _fastest(torch.cuda.get_device_name(), q.dtype, q.shape[-1], *has)


@cache
def _fastest(
    device_name: str, dtype: torch.dtype, head_dim: int, has_window: bool, has_softcap: bool
) -> Configs:
    """Times the candidates on the current device, of that name."""
    device = torch.device("cuda")
    capability = torch.cuda.get_device_capability()
    options = candidates_for(capability, dtype, head_dim, has_window or has_softcap)
    window, softcap = WINDOW if has_window else None, SOFTCAP if has_softcap else None
    layout = TrieLayout(fork_join_subtree_ends().to(device))
    num_tokens, scale = layout.num_tokens, head_dim**-0.5
    q, out, dout = torch.randn(3, num_tokens, 16, head_dim, dtype=dtype, device=device)
    k, v = torch.randn(2, num_tokens, 4, head_dim, dtype=dtype, device=device)
    mask = layout.subtree_ends, layout.window_starts(WINDOW) if has_window else None
    lse2, delta = bwd.row_stats(dout, out, torch.zeros(16, num_tokens, device=device))

    def forward(config: Config) -> object:
        schedule = layout.block_schedule(config.block_q, config.block_kv, window)
        return fwd.forward(q, k, v, *mask, schedule, scale, softcap, config)

    def gradient(of: Callable[..., object]) -> Callable[[Config], object]:
        def run(config: Config) -> object:
            schedule = layout.block_schedule(config.block_q, config.block_kv, window)
            return of(dout, q, k, v, lse2, delta, *mask, schedule, scale, softcap, config)

        return run

    return Configs(
        _fastest_of(options.forward, forward),
        _fastest_of(options.dq, gradient(bwd.grad_q)),
        _fastest_of(options.dkv, gradient(bwd.grad_kv)),
    )


def _fastest_of(options: tuple[Config, ...], run: Callable[[Config], object]) -> Config:
    if len(options) == 1:
        return options[0]

    def milliseconds(config: Config) -> float:
        return cast(float, triton.testing.do_bench(lambda: run(config)))

    return min(options, key=milliseconds)


def fork_join_subtree_ends() -> Tensor:
    """The trie that is timed: a prefix, five threads of 768 tokens, a join after the first one.

    int32 [8192]. The joined context continues the first thread (docs/architecture.md, fact 7), so
    the join's tokens see that thread's; the other four threads stand beside it.
    """
    prefix, thread, join = 2048, 768, 2304
    ends = [8192] * prefix + [prefix + thread + join] * (thread + join)
    for _ in range(4):
        ends += [len(ends) + thread] * thread
    return torch.tensor(ends, dtype=torch.int32)
