"""What a decoder does between its matrix products and its attention, each in one Triton kernel and
with its gradient in one more:

    rms_norm.py      RMSNorm, of a sum too, which it also returns; into any dtype
    rotary.py        the rotary embedding of queries and keys, RMSNorm of their heads before it too
    swiglu.py        silu(gate) * up
    log_softmax.py   log-probabilities and entropies of logits; the gradient overwrites the logits

Everything is computed in float32 and rounded once, as it is stored. Sums are taken in an order that
depends on shapes and the device alone: results are the same from run to run, bit for bit.

These modules import Triton: import one only where `why_not` is None. On a CPU they run in Triton's
interpreter, for tests.

Block sizes and warps are those that give a warp 512 elements or fewer. Not timed yet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tw_kernels.triton_device import why_no_triton


def why_not(device: torch.device) -> str | None:
    """None if these kernels can run on tensors of a device, else the reason."""
    return why_no_triton(device)


def runs_on(x: Tensor) -> bool:
    """Whether these kernels can run on x; `why_not` without its words."""
    return x.is_cuda or (x.is_cpu and why_not(x.device) is None)
