"""The peers of trie attention: PyTorch's attention functions and published flash kernels.

    SDPA dense mask       scaled dot-product attention with a mask of N x N: torch's own choice of
                          kernel, and on CUDA each kernel that takes a mask
    SDPA causal           plain causal attention of N tokens, on CUDA with torch's FlashAttention-2.
                          Not the same problem: the reference of `of causal` and of plots
    cuDNN causal          the same by cuDNN, on CUDA: what the hardware's vendor reaches
    FlashAttention 2, 3, 4, causal
                          the same by the packages of these kernels, where they are installed
    FlexAttention         compiled, with a prebuilt block mask, and including building it
    FlexAttention: FLASH  the same by FlashAttention 4, where it is installed
    FlexAttention, bitmap the same with the mask as N x N / 64 words, as AReaL's tree training
                          has it; on CUDA
    unrolled varlen_attn  every path a sequence of its own, all in one call, as in trainers that do
                          not share prefixes; on CUDA
    unrolled SDPA         the same, one path at a time

Peers get their inputs in the memory layout that suits them. What does not depend on q, k and v (the
dense mask, FlexAttention's block mask, gathering the tokens of the paths) is done outside the timed
region, except for "FlexAttention + mask build".
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch._functorch.config as functorch_config
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel, varlen
from torch.nn.attention.flex_attention import flex_attention

from bench.attention_setup import AttentionSetup
from bench.availability import cuda_only, lacks, why_not_importable
from bench.masks import (
    MaskMod,
    ancestor_mask_mod,
    bitmap,
    bitmap_mask_mod,
    block_mask,
    visible,
)
from bench.suite import Peer, Skip

DENSE, CAUSAL, CUDNN = "SDPA dense mask", "SDPA causal", "cuDNN causal"
FLEX, FLEX_BUILD = "FlexAttention", "FlexAttention + mask build"
FLEX_FLASH, FLEX_BITMAP = "FlexAttention: FLASH", "FlexAttention, bitmap"
UNROLLED_VARLEN, UNROLLED_SDPA = "unrolled varlen_attn", "unrolled SDPA"
FLEX_FEWEST_TOKENS = 1024  # least number of tokens of FlexAttention on a CPU
MOST_SCORE_BYTES = 8 * 2**30  # of the scores that SDPA's math kernel writes to memory
DENSE_KERNELS = {
    "math": SDPBackend.MATH,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
}

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Call = Callable[[int], Any]


class FlashPackage(NamedTuple):
    """A package with a `flash_attn_func(q, k, v, causal=...)` of [1, N, H, D], half precision.

    Attributes:
        module: the module that has the function.
        distribution: what to install.
        capability: the first and the last major compute capability it runs on.
        backward: whether the function is differentiable.
    """

    module: str
    distribution: str
    capability: tuple[int, int]
    backward: bool = True


FLASH_PACKAGES = {
    "FlashAttention 2, causal": FlashPackage("flash_attn", "flash-attn", (8, 99)),
    "FlashAttention 3, causal": FlashPackage(
        "flash_attn_interface", "FlashAttention 3, built from source,", (9, 9)
    ),
    "FlashAttention 3 forward, causal": FlashPackage(
        "fa3_fwd_interface", "fa3-fwd", (9, 9), backward=False
    ),
    "FlashAttention 4, causal": FlashPackage(
        "flash_attn.cute", "flash-attn-4 (threadweaver[flash])", (9, 10)
    ),
}


def _batched(setup: AttentionSetup, attend: Attend) -> Call:
    """A call of `attend` on [1, H, N, D] inputs."""
    inputs = [setup.leaves(setup.inputs(i), batched=True) for i in range(setup.input_sets)]
    return lambda i: setup.run(attend, *inputs[i])


def _by_kernel(attend: Attend, kernel: SDPBackend) -> Attend:
    """`attend` on one kernel of SDPA only; raises RuntimeError if that cannot run the call."""

    def by_kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(kernel):
            return attend(q, k, v)

    return by_kernel


def _dense(setup: AttentionSetup, kernel: SDPBackend | None) -> Call:
    n = setup.layout.num_tokens
    setup.limit(n * n, f"its mask is {n * n / 1e9:.1f} GB")
    if kernel is SDPBackend.MATH:
        scores = n * n * setup.problem.heads * 4
        if scores > MOST_SCORE_BYTES:
            raise Skip(f"writes {scores / 1e9:.0f} GB of scores")
    mask = visible(setup.layout.subtree_ends, setup.problem.starts)
    grouped = setup.group > 1

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if grouped:  # the fused kernels that take a mask take no grouped heads
            k, v = (x.repeat_interleave(setup.group, dim=1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return _batched(setup, _by_kernel(attend, kernel) if kernel is not None else attend)


def _causal_sdpa(setup: AttentionSetup) -> Attend:
    grouped = setup.group > 1
    return functools.partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=grouped)


def _refuse_window(setup: AttentionSetup) -> None:
    if setup.problem.window is not None:
        raise Skip("has no window")


def _causal(setup: AttentionSetup, kernel: SDPBackend = SDPBackend.FLASH_ATTENTION) -> Call:
    _refuse_window(setup)
    setup.limit(setup.causal_pairs)
    attend = _causal_sdpa(setup)
    return _batched(setup, _by_kernel(attend, kernel) if setup.device == "cuda" else attend)


def _why_no_package(package: FlashPackage, device: str) -> str | None:
    if why := cuda_only(device):
        return why
    first, last = package.capability
    major, minor = torch.cuda.get_device_capability()
    if not first <= major <= last:
        return f"does not run on compute capability {major}.{minor}"
    return why_not_importable(package.module, "flash_attn_func", package.distribution)


def _package_causal(setup: AttentionSetup, package: FlashPackage) -> Call:
    _refuse_window(setup)
    if setup.dtype == torch.float32:
        raise Skip("takes half precision only")
    if setup.backward and not package.backward:
        raise Skip(f"{package.distribution} has no backward")
    flash = importlib.import_module(package.module).flash_attn_func
    sets = [setup.leaves(x.unsqueeze(0) for x in setup.inputs(i)) for i in range(setup.input_sets)]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out  # some versions add the log-sum-exp

    def call(i: int) -> tuple[Tensor, ...]:
        return tuple(x.squeeze(0) for x in setup.run(attend, *sets[i]))

    return call


def _compiled(setup: AttentionSetup) -> Callable[..., Tensor]:
    """FlexAttention, compiled once for each setup and shared by its rows."""
    key = "flex", setup.dtype, setup.what
    if key not in setup.problem.memo:
        torch._dynamo.reset()  # guards of earlier shapes would slow the call
        # The backward pass by itself runs many times on one forward pass.
        functorch_config.donated_buffer = setup.what != "bwd"
        setup.problem.memo[key] = torch.compile(flex_attention, dynamic=False)
    return setup.problem.memo[key]


def _mask_mod(setup: AttentionSetup, kind: str) -> MaskMod:
    """A `mask_mod` of the trie, "ancestors" or "bitmap", the same object for all rows."""
    memo, layout, starts = setup.problem.memo, setup.layout, setup.problem.starts
    if kind not in memo:
        ends = layout.subtree_ends
        bits = kind == "bitmap"
        memo[kind] = (
            bitmap_mask_mod(bitmap(ends, starts)) if bits else ancestor_mask_mod(ends, starts)
        )
    return memo[kind]


def _flex(
    setup: AttentionSetup, with_build: bool = False, kind: str = "ancestors", backend: str = ""
) -> Call:
    n = setup.layout.num_tokens
    if setup.device == "cpu" and setup.backward:
        raise Skip("FlexAttention has no backward on a CPU")
    if setup.device == "cpu" and n < FLEX_FEWEST_TOKENS:
        raise Skip(f"compiling takes seconds a shape: on a CPU from {FLEX_FEWEST_TOKENS} tokens on")
    setup.limit(setup.problem.visible_pairs)
    compiled = _compiled(setup)
    build = functools.partial(block_mask, _mask_mod(setup, kind), n, setup.device)
    built = None if with_build else build()
    options: dict[str, Any] = {"enable_gqa": setup.group > 1}
    if backend:
        options["kernel_options"] = {"BACKEND": backend}
    return _batched(
        setup, lambda q, k, v: compiled(q, k, v, block_mask=built or build(), **options)
    )


def _why_no_flex_flash(device: str) -> str | None:
    return _why_no_package(FLASH_PACKAGES["FlashAttention 4, causal"], device)


def _why_no_varlen(device: str) -> str | None:
    return cuda_only(device) or lacks(varlen.varlen_attn, "window_size")


def _unrolled_varlen(setup: AttentionSetup) -> Call:
    if setup.dtype == torch.float32:
        raise Skip("takes half precision only")
    if setup.group > 1 and (why := lacks(varlen.varlen_attn, "enable_gqa")):
        raise Skip(why)
    setup.limit(setup.problem.unrolled_pairs)
    lengths = [len(nodes) for nodes in setup.problem.path_nodes]
    ends = torch.tensor([0, *lengths], device=setup.device).cumsum(0, dtype=torch.int32)
    sizes = ends, ends, max(lengths), max(lengths)
    options: dict[str, Any] = {"enable_gqa": True} if setup.group > 1 else {}
    inputs = [setup.unrolled_inputs(i) for i in range(setup.input_sets)]
    before = -1 if setup.problem.window is None else setup.problem.window - 1

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = varlen.varlen_attn(q, k, v, *sizes, window_size=(before, 0), **options)
        assert isinstance(out, Tensor)
        return out

    return lambda i: setup.run(attend, *inputs[i])


def _unrolled_sdpa(setup: AttentionSetup) -> Call:
    _refuse_window(setup)
    setup.limit(setup.problem.unrolled_pairs)
    attend = _causal_sdpa(setup)
    lengths = [len(nodes) for nodes in setup.problem.path_nodes]

    def paths(i: int) -> list[tuple[Tensor, ...]]:
        by_path = zip(*(x.split(lengths) for x in setup.unrolled_inputs(i)), strict=True)
        return [setup.leaves(values, batched=True) for values in by_path]

    sets = [paths(i) for i in range(setup.input_sets)]
    return lambda i: [setup.run(attend, *inputs) for inputs in sets[i]]


PEERS: list[Peer[AttentionSetup]] = [
    Peer(DENSE, functools.partial(_dense, kernel=None)),
    *(
        Peer(f"{DENSE}: {name}", functools.partial(_dense, kernel=kernel), why_absent=cuda_only)
        for name, kernel in DENSE_KERNELS.items()
    ),
    Peer(CAUSAL, _causal),
    Peer(
        CUDNN,
        functools.partial(_causal, kernel=SDPBackend.CUDNN_ATTENTION),
        why_absent=cuda_only,
    ),
    *(
        Peer(
            name,
            functools.partial(_package_causal, package=package),
            why_absent=functools.partial(_why_no_package, package),
        )
        for name, package in FLASH_PACKAGES.items()
    ),
    Peer(FLEX, _flex),
    Peer(FLEX_BUILD, functools.partial(_flex, with_build=True)),
    Peer(FLEX_FLASH, functools.partial(_flex, backend="FLASH"), why_absent=_why_no_flex_flash),
    Peer(FLEX_BITMAP, functools.partial(_flex, kind="bitmap"), why_absent=cuda_only),
    Peer(UNROLLED_VARLEN, _unrolled_varlen, why_absent=_why_no_varlen),
    Peer(UNROLLED_SDPA, _unrolled_sdpa),
]
