"""The bytes of an update on one of several ranks (FSDP2).

Each rank holds its share of parameters, gradients and optimizer state. A decoder layer is gathered
before it runs and dropped after it, forward and backward, the next one meanwhile; all that is in no
layer (embedding, last norm, output layer) stays gathered from the forward to the end of the
backward pass. Gradients of a layer wait in the dtype of products until it is done, and are summed
over the ranks in float32. Adapters and their gradients and moments are whole on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    """

    parameters: int
    gradients: int
    gathered: int
    summed: int
    activations: int
    output_pieces: int
    peak: int


def sharded(
    found: UpdateBytes, target: Target, adapters: bool, sums_gradients: bool
) -> ShardedUpdate:
    """Args:
    found: the passes of one process, with the parameters in target.products and gradients that
        leave at once.
    adapters: whether adapters are trained, of which each rank has all, float32.
    sums_gradients: whether a rank has several passes.
    """
    item, own = target.products.itemsize, target.parameters.itemsize
    layer, rest = found.layer, found.rest
    whole = rest.parameters * item
    layers = _LAYERS_AT_ONCE * layer.parameters * item
    if adapters:
        gradients = found.gradients
        base = target.shard((found.parameters - gradients) // item) * own
        most = gradients + layers + max(found.in_output, found.in_layers)
        parameters, summed = base + gradients, 0
    else:
        gradients = target.shard(found.gradients // item) * own
        summed = layer.trained * _SUMMED
        parameters = target.shard(found.parameters // item) * own
        # The output layer's gradients, and those of a layer, in the dtype of products.
        waiting = (rest.output + layer.trained) * item
        before = gradients if sums_gradients else 0
        most = max(
            before + layers + found.in_output,
            before + layers + waiting + found.in_layers,
            gradients + layers + waiting + summed + found.late,
            gradients + rest.trained * (item + _SUMMED),
        )
        summed = max(waiting + summed, rest.trained * (item + _SUMMED))
    return ShardedUpdate(
        parameters,
        gradients,
        whole + layers,
        summed,
        found.activations,
        found.output_pieces,
        parameters + whole + most,
    )
