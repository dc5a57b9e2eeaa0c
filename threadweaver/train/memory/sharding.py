"""The bytes of an update on one of several ranks (FSDP2).

Each rank holds its share of parameters, gradients and optimizer state. A decoder layer is gathered
before it runs and dropped after it, forward and backward, the next one meanwhile; all that is in no
layer (embedding, last norm, output layer) stays gathered from the forward to the end of the
backward pass. Gradients of a layer wait in the dtype of products until it is done, and are summed
over the ranks in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from threadweaver.train.memory.target import Target
from threadweaver.train.memory.update import UpdateBytes

_SUMMED = 4  # bytes of an element while it is summed over the ranks
_LAYERS_AT_ONCE = 2  # the one that runs and the one that comes next


@dataclass(frozen=True)
class ShardedUpdate:
    """Bytes of an update on one rank, the optimizer's state apart.

    Attributes:
        parameters, gradients: its shares.
        gathered: parameters of which it holds all for a time.
        summed: gradients before they are its share, at most.
        activations, output_pieces: as in one process.
        peak: most that is held at a time.
        elements: its share of each parameter that is trained.
    """

    parameters: int
    gradients: int
    gathered: int
    summed: int
    activations: int
    output_pieces: int
    peak: int
    elements: tuple[int, ...]


def sharded(
    found: UpdateBytes, target: Target, trained: torch.dtype, sums_gradients: bool
) -> ShardedUpdate:
    """Args:
    found: the passes of one process, with the parameters in target.products and gradients that
        leave at once.
    trained: dtype of what is.
    sums_gradients: whether a rank has several passes.
    """
    item, own = target.products.itemsize, target.parameters.itemsize
    elements = tuple(target.shard(n) for n in found.elements)
    parameters = target.shard(found.parameters // item) * own
    gradients = sum(elements) * trained.itemsize
    layer, rest = found.layer, found.rest
    whole = rest.parameters * item
    layers = _LAYERS_AT_ONCE * layer.parameters * item
    # The output layer's gradients, and those of a layer, in the dtype of products.
    waiting = (rest.output + layer.trained) * item
    before = gradients if sums_gradients else 0
    most = max(
        before + layers + found.in_output,
        before + layers + waiting + found.in_layers,
        gradients + layers + waiting + layer.trained * _SUMMED + found.late,
        gradients + rest.trained * (item + _SUMMED),
    )
    return ShardedUpdate(
        parameters,
        gradients,
        whole + layers,
        max(waiting + layer.trained * _SUMMED, rest.trained * (item + _SUMMED)),
        found.activations,
        found.output_pieces,
        parameters + whole + most,
        elements,
    )
