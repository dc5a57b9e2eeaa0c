"""The visibility of a trie as other libraries take it: a dense mask, and FlexAttention's masks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

FLEX_BLOCK = 128


def visible(subtree_ends: Tensor) -> Tensor:
    """The dense mask, bool [N, N]: [i, j] is true where token i attends to token j."""
    at = torch.arange(subtree_ends.numel(), device=subtree_ends.device)
    return (at <= at[:, None]) & (at[:, None] < subtree_ends)


def ancestor_mask_mod(subtree_ends: Tensor) -> Callable[..., Tensor]:
    """The same predicate as a `mask_mod` of FlexAttention."""

    def mask_mod(_batch: Tensor, _head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return (column <= row) & (row < subtree_ends[column])

    return mask_mod


def block_mask(mask_mod: Callable[..., Tensor], n: int, device: str) -> BlockMask:
    """The block mask of n tokens, built as FlexAttention's documentation says: compiled on CUDA,
    eager on a CPU."""
    return create_block_mask(
        *(mask_mod, None, None, n, n),
        device=device,
        BLOCK_SIZE=FLEX_BLOCK,
        _compile=device == "cuda",
    )
