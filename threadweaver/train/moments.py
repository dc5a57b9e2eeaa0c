"""Moments of 8 bits (torchao's), the plain tensors that they are made of, and who has them.

Each BLOCK elements, in the order of memory, share a scale; what a code stands for is its value in
`qmap`, times that. Of a parameter whose rows are divided among ranks, moments are of 8 bits only if
the rows of every rank are whole blocks. So blocks are the same for all numbers of ranks, and a
checkpoint's codes and scales go from one to another as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import lcm, prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from threadweaver.model.whole import local

# torchao: what is smaller, or no whole number of blocks, is kept as it is.
LEAST, BLOCK = 4096, 256


def shard_sizes(shape: Sequence[int], count: int) -> list[int]:
    """Elements of what each of so many ranks holds of a parameter (FSDP2)."""
    rows, *others = shape or (1,)
    most = -(-rows // count)
    return [max(min(most, rows - rank * most), 0) * prod(others) for rank in range(count)]


def is_quantised(shape: Sequence[int], count: int) -> bool:
    """Whether moments of a parameter have 8 bits when so many ranks share it."""
    return all(size >= LEAST and size % BLOCK == 0 for size in shard_sizes(shape, count))


def has_codes(moment: Tensor | None) -> bool:
    return moment is not None and hasattr(local(moment), "codes")


def parts(moment: Tensor) -> dict[str, Tensor]:
    """Of one of 8 bits, in its memory: codes, uint8, of its shape; scale, float32 [groups, blocks
    of a group]; qmap, float32 [256]. Codes and scale are divided among ranks as it is: a group is
    the fewest rows that are whole blocks."""
    own: Any = local(moment)
    group = lcm(prod(moment.shape[1:]), BLOCK)
    scale = own.scale.view(-1, group // BLOCK)
    whole = (moment.numel() // group, group // BLOCK)
    return {
        "codes": divided_as(moment, own.codes, moment.shape),
        "scale": divided_as(moment, scale, whole),
        "qmap": own.qmap,
    }


def without_codes(moment: Tensor) -> Tensor:
    """Values of a moment that one process has; float32 if it has 8 bits."""
    return moment.dequantize() if has_codes(moment) else moment


def room_for(moment: Tensor, scale: TensorStorageMetadata | None) -> Tensor | dict[str, Tensor]:
    """What a stored moment is to be read into before `take` is called.

    Args:
        moment: where it will be.
        scale: that of the stored one; None: it has none.
    """
    own = local(moment)
    if scale is not None and has_codes(moment):
        return parts(moment)
    if scale is not None:
        codes = torch.empty(own.shape, dtype=torch.uint8, device=own.device)
        return {
            "codes": divided_as(moment, codes, moment.shape),
            "scale": torch.empty(scale.size, device=own.device),  # all of it
            "qmap": torch.empty(256, device=own.device),
        }
    if has_codes(moment):
        return divided_as(moment, torch.empty(own.shape, device=own.device), moment.shape)
    return moment


def take(moment: Tensor, stored: Tensor | dict[str, Tensor]) -> None:
    """Gives a moment the values that were read into what `room_for` made."""
    own = local(moment)
    if isinstance(stored, Tensor):
        if stored is not moment:
            own.copy_(local(stored))  # finds scales and codes
    elif not has_codes(moment):
        own.copy_(_values(stored, _start(moment)).view_as(own))


def _values(stored: dict[str, Tensor], start: int) -> Tensor:
    """Of codes that begin with element `start` of those that the scales are of; float32, flat."""
    codes = local(stored["codes"]).flatten()
    first, skipped = divmod(start, BLOCK)
    last = -(-(start + len(codes)) // BLOCK)
    scale = stored["scale"].flatten()[first:last].repeat_interleave(BLOCK)
    return stored["qmap"][codes.int()] * scale[skipped : skipped + len(codes)]


def _start(moment: Tensor) -> int:
    """How many elements ranks before this one have."""
    if not isinstance(moment, DTensor):
        return 0
    mesh = moment.device_mesh
    return sum(shard_sizes(moment.shape, mesh.size())[: mesh.get_local_rank()])


def divided_as(moment: Tensor, own: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor of this shape, whose part of this rank is `own`."""
    if not isinstance(moment, DTensor):
        return own
    return DTensor.from_local(
        own,
        moment.device_mesh,
        moment.placements,
        run_check=False,
        shape=torch.Size(shape),
        stride=torch.empty(shape, device="meta").stride(),
    )
