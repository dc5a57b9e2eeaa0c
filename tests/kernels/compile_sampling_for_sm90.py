"""Compiles the sampling kernels for sm_90, with no GPU; prints JSON rows.

As compile_for_sm90.py, whose driver and figures it uses; run it without TRITON_INTERPRET.

    python -m tests.kernels.compile_sampling_for_sm90 bfloat16 --sm 80
"""

from __future__ import annotations

import argparse
import json
import re

import torch

from tests.kernels.compile_for_sm90 import compile_instead_of_launching, figures
from tw_kernels.sampling import SamplingRows, triton
from tw_kernels.sampling.rows import Settings

VOCABULARY = 151_936  # of Qwen3
# PTX of a product or sum that ptxas may still contract, since it names no rounding; and of one that
# is contracted.
COUNTED = {
    "contractible": r"\b(?:mul|add|sub)\.(?:ftz\.)?f32\b",
    "fma": r"\bfma\.rn\.(?:ftz\.)?f32\b",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dtype")
    parser.add_argument("--sm", type=int, default=90)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    compiled = compile_instead_of_launching(args.sm)
    rows = SamplingRows.build([0] * 4, [0] * 4, [Settings.of(0.7, None, 0.9, 0.0)] * 4)
    triton.forward(torch.zeros(4, VOCABULARY, dtype=dtype), rows, None)
    for kernel in compiled:
        ptx = kernel.asm["ptx"]
        row = {"kernel": kernel.name, "threads": kernel.metadata.num_warps * 32}
        row |= {name: len(re.findall(form, ptx)) for name, form in COUNTED.items()}
        print(json.dumps(row | figures(kernel)), flush=True)


if __name__ == "__main__":
    main()
