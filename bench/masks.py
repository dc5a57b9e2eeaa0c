"""The visibility of a trie as other libraries take it: a dense mask, a bitmap, and FlexAttention's
masks. `starts` are the layout's `window_starts`, or None without a window."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

FLEX_BLOCK = 128
WORD = 64  # bits of an element of a bitmap
ROWS = 1024  # of a bitmap that are built at a time

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def visible(
    subtree_ends: Tensor, starts: Tensor | None = None, rows: slice = slice(None)
) -> Tensor:
    """The dense mask, bool [N, N]: [i, j] is true where token i attends to token j; or some rows of
    it."""
    at = torch.arange(subtree_ends.numel(), device=subtree_ends.device)
    row = at[rows, None]
    mask = (at <= row) & (row < subtree_ends)
    return mask if starts is None else mask & (at >= starts[rows, None])


def ancestor_mask_mod(subtree_ends: Tensor, starts: Tensor | None = None) -> MaskMod:
    """The same predicate as a `mask_mod` of FlexAttention."""

    def mask_mod(_batch: Tensor, _head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        seen = (column <= row) & (row < subtree_ends[column])
        return seen if starts is None else seen & (column >= starts[row])

    return mask_mod


def bitmap(subtree_ends: Tensor, starts: Tensor | None = None) -> Tensor:
    """The dense mask in bits, int64 [N, ceil(N / 64)]: bit b of word w is column 64 w + b."""
    n, device = subtree_ends.numel(), subtree_ends.device
    bit = torch.arange(WORD, device=device)
    out = torch.empty(n, -(-n // WORD), dtype=torch.int64, device=device)
    for first in range(0, n, ROWS):
        rows = slice(first, min(first + ROWS, n))
        mask = torch.nn.functional.pad(visible(subtree_ends, starts, rows), (0, -n % WORD))
        out[rows] = (mask.unflatten(1, (-1, WORD)).long() << bit).sum(-1)
    return out


def bitmap_mask_mod(bits: Tensor) -> MaskMod:
    """The predicate of a bitmap as a `mask_mod` of FlexAttention."""

    def mask_mod(_batch: Tensor, _head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return ((bits[row, column // WORD] >> (column % WORD)) & 1) == 1

    return mask_mod


def block_mask(mask_mod: MaskMod, n: int, device: str) -> BlockMask:
    """The block mask of n tokens, built as FlexAttention's documentation says: compiled on CUDA,
    eager on a CPU."""
    return create_block_mask(
        *(mask_mod, None, None, n, n),
        device=device,
        BLOCK_SIZE=FLEX_BLOCK,
        _compile=device == "cuda",
    )
