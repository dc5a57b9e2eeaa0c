"""torchao's AdamW with moments, a copy of the parameters and the step on the host (extra `memory`),
of one GPU."""

from __future__ import annotations

from typing import Any

import torchao.optim  # pyright: ignore[reportMissingImports]


class CPUOffloadOptimizer(torchao.optim.CPUOffloadOptimizer):
    """Parameters too small to be moved have an optimizer on the device."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those in use. Loading a state makes new ones, and torchao's own property goes on with
        the old ones of the device: no learning rate would reach its optimizer any more."""
        optimizers = [*filter(None, [self.d_opt]), *self.optim_dict.values()]
        return [group for optimizer in optimizers for group in optimizer.param_groups]
