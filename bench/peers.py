"""What trie attention is compared with: scaled dot-product attention and FlexAttention of PyTorch.

Peers get their inputs in the layout they like best, [1, H, N, D] contiguous, and whatever does not
depend on q, k and v (the dense mask, FlexAttention's block mask) is built outside the timed region,
except in the row that says otherwise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from bench.frame import Peer, Skip

if TYPE_CHECKING:
    from bench.attention import AttentionSetup

DENSE, CAUSAL = "SDPA dense mask", "SDPA causal"
FLEX, FLEX_BUILD = "FlexAttention", "FlexAttention + mask build"
FLEX_BLOCK = 128
FLEX_FEWEST_TOKENS = 1024  # on a CPU

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Call = Callable[[int], Any]


def visible(subtree_ends: Tensor) -> Tensor:
    """The dense mask, bool [N, N]."""
    at = torch.arange(subtree_ends.numel(), device=subtree_ends.device)
    return (at <= at[:, None]) & (at[:, None] < subtree_ends)


def ancestor_mask_mod(subtree_ends: Tensor) -> Callable[..., Tensor]:
    """The same inequality, as FlexAttention takes it."""

    def mask_mod(_batch: Tensor, _head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return (column <= row) & (row < subtree_ends[column])

    return mask_mod


def block_mask(mask_mod: Callable[..., Tensor], n: int, device: str) -> BlockMask:
    """As FlexAttention's documentation has it: compiled on CUDA, eager on a CPU."""
    return create_block_mask(
        *(mask_mod, None, None, n, n),
        device=device,
        BLOCK_SIZE=FLEX_BLOCK,
        _compile=device == "cuda",
    )


def _batched(setup: AttentionSetup, attend: Attend) -> Call:
    """Times `attend` on [1, H, N, D] inputs."""
    inputs = [setup.inputs(i, batched=True) for i in range(setup.input_sets)]
    return lambda i: setup.run(attend, *inputs[i])


def _dense(setup: AttentionSetup) -> Call:
    n = setup.layout.num_tokens
    setup.limit(n * n, f"its mask is {n * n / 1e9:.1f} GB")
    mask, grouped = visible(setup.layout.subtree_ends), setup.group > 1

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if grouped:  # the fused kernels that take a mask take no grouped heads
            k, v = (x.repeat_interleave(setup.group, dim=1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return _batched(setup, attend)


def _causal(setup: AttentionSetup) -> Call:
    setup.limit(setup.causal_pairs)
    attend = functools.partial(
        F.scaled_dot_product_attention, is_causal=True, enable_gqa=setup.group > 1
    )
    if setup.device == "cpu":
        return _batched(setup, attend)

    def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return attend(q, k, v)

    return _batched(setup, flash)


def _compiled(setup: AttentionSetup) -> Callable[..., Tensor]:
    """One compilation for each case and dtype, shared by the rows that need it."""
    key = "flex", setup.dtype
    if key not in setup.problem.memo:
        torch._dynamo.reset()  # every shape compiles anew: old ones would only slow the guards
        setup.problem.memo[key] = torch.compile(flex_attention, dynamic=False)
    return setup.problem.memo[key]


def _flex(setup: AttentionSetup, with_build: bool) -> Call:
    n = setup.layout.num_tokens
    if setup.device == "cpu" and setup.backward:
        raise Skip("FlexAttention has no backward on a CPU")
    if setup.device == "cpu" and n < FLEX_FEWEST_TOKENS:
        raise Skip(f"compiling takes seconds a shape: on a CPU from {FLEX_FEWEST_TOKENS} tokens on")
    setup.limit(setup.layout.visible_pairs)
    compiled, memo = _compiled(setup), setup.problem.memo
    if "mask_mod" not in memo:
        memo["mask_mod"] = ancestor_mask_mod(setup.layout.subtree_ends)
    build = functools.partial(block_mask, memo["mask_mod"], n, setup.device)
    built = None if with_build else build()
    gqa = setup.group > 1
    return _batched(
        setup, lambda q, k, v: compiled(q, k, v, block_mask=built or build(), enable_gqa=gqa)
    )


PEERS: list[Peer[AttentionSetup]] = [
    Peer(DENSE, _dense),
    Peer(CAUSAL, _causal),
    Peer(FLEX, functools.partial(_flex, with_build=False)),
    Peer(FLEX_BUILD, functools.partial(_flex, with_build=True)),
]
