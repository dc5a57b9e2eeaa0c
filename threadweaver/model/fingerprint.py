"""A short name of a model's weights, by which responses of two models are told apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from torch import Tensor, nn

_SAMPLED = 64  # values of each tensor: training changes nearly all


def weights_fingerprint(
    model: nn.Module, parameters: Iterable[tuple[str, Tensor]] | None = None
) -> str:
    """SHA-256, hexadecimal, of the names and shapes of all parameters and of evenly spaced values
    of each. Reads a few KB, whatever the model's size.

    Args:
        parameters: names and values in place of the model's own.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters() if parameters is None else parameters:
        flat = parameter.detach().flatten()
        sampled = flat[:: max(1, flat.numel() // _SAMPLED)].float().cpu()
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(sampled.numpy().tobytes())
    return digest.hexdigest()
