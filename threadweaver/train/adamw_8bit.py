"""torchao's AdamW with moments of 8 bits (extra `memory`), of parameters that ranks may share."""

from __future__ import annotations

import torch
import torchao.optim  # pyright: ignore[reportMissingImports]
from torch import Tensor
from torch.distributed.tensor import DTensor

from threadweaver.train.moments import is_quantised


class AdamW8bit(torchao.optim.AdamW8bit):
    """Its moments of a parameter are of 8 bits on all ranks or on none: torchao's own have them on
    those whose rows are whole blocks, and no checkpoint of such can be read by other ranks."""

    def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
        if isinstance(p, DTensor) and not is_quantised(p.shape, p.device_mesh.size()):
            return torch.zeros_like(p)
        return super()._new_buffer(p, signed)
