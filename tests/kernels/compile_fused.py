"""Compiles the fused kernels, with no GPU, for an architecture, at the sizes of a model of 8 B;
prints JSON rows. Run it without TRITON_INTERPRET, as test_fused_compile.py does.

    python -m tests.kernels.compile_fused 90
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator

import torch

from tests.kernels.compile_for_sm90 import compile_instead_of_launching, figures
from tw_kernels.fused.log_softmax import Transform, gradient_, statistics
from tw_kernels.fused.rms_norm import add_rms_norm, rms_norm
from tw_kernels.fused.rotary import Norm, rotary
from tw_kernels.fused.swiglu import swiglu

HIDDEN, HALF = 4096, torch.bfloat16


def launches() -> Iterator[str]:
    """Launches every kernel as a step of training in autocast does; yields what it was."""

    def matrix(columns: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(64, columns, dtype=dtype, requires_grad=True)

    x, delta = matrix(HIDDEN, torch.float32), matrix(HIDDEN, HALF)
    weight = torch.ones(HIDDEN, requires_grad=True)
    total, y = add_rms_norm(x, delta, weight, 1e-6, out_dtype=HALF)
    yield "residual and norm"
    torch.autograd.grad((total, y), (x, delta, weight), (total, y))
    yield "residual and norm, backward"
    heads = torch.zeros(64, 16, 128, dtype=HALF, requires_grad=True)
    y = rms_norm(heads, torch.ones(128), 1e-6)
    yield "norm of heads"
    y.backward(y)
    yield "norm of heads, backward"
    rotary(heads, heads[:, :8], torch.zeros(64, 128), torch.zeros(64, 128), HALF)
    yield "rotary"
    # Heads of 256 are those of Gemma 3, and two tiles of the gradient; 128 heads its largest block.
    for q_heads, k_heads, dim in ((32, 8, 128), (8, 4, 256), (128, 8, 128)):
        q, k = (torch.zeros(64, h, dim, dtype=HALF, requires_grad=True) for h in (q_heads, k_heads))
        angles, norm = torch.zeros(64, dim), Norm(torch.ones(dim, requires_grad=True), 1e-6)
        turned = rotary(q, k, angles, angles, HALF, norm, norm)
        yield f"norms and rotary of {q_heads} heads of {dim}"
        torch.autograd.backward(turned, [x.detach() for x in turned])
        yield f"norms and rotary of {q_heads} heads of {dim}, backward"
    gate, up = matrix(3 * HIDDEN, HALF), matrix(3 * HIDDEN, HALF)
    y = swiglu(gate, up)
    yield "swiglu"
    y.backward(y)
    yield "swiglu, backward"
    logits, targets = torch.zeros(64, 151_936, dtype=HALF), torch.zeros(64, dtype=torch.int64)
    transform = Transform(0.5, 30.0, 151_669, torch.zeros(151_669, dtype=torch.bool))
    found = statistics(logits, targets, transform)
    yield "log-softmax"
    gradient_(logits, targets, transform, found, found.lse, found.lse)
    yield "log-softmax, backward"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sm", type=int)
    compiled = compile_instead_of_launching(parser.parse_args().sm)
    for name in launches():
        print(json.dumps({"kernel": name} | figures(compiled[-1])))


if __name__ == "__main__":
    main()
