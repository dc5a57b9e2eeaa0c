"""The decoder layers of a model."""

from __future__ import annotations

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def layers_of(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """Those that `transformers` knows by their class, in order; empty if it knows none."""
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
