"""torchao's AdamW with moments of 8 bits (extra `memory`), of parameters that ranks may share."""

from __future__ import annotations

import torch
import torchao.optim  # pyright: ignore[reportMissingImports]
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchao.optim.subclass_8bit import OptimState8bit  # pyright: ignore[reportMissingImports]

from threadweaver.model.whole import local
from threadweaver.train.moments import BLOCK, divided_as, is_quantised


class AdamW8bit(torchao.optim.AdamW8bit):
    """Its moments of a parameter are of 8 bits on all ranks or on none: torchao's own have them on
    those whose rows are whole blocks, and no checkpoint of such can be read by other ranks."""

    def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
        if not isinstance(p, DTensor):
            return super()._new_buffer(p, signed)
        if not is_quantised(p.shape, p.device_mesh.size()):
            return torch.zeros_like(p)
        own = local(p)
        # float32, whatever p is: torchao's views are, and torch.compile asks for the same dtype.
        codes = OptimState8bit.zeros(own.shape, signed, BLOCK, own.device, torch.float32)
        return divided_as(p, codes, p.shape)
