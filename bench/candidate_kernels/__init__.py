"""CUDA attention kernels that no figure has chosen yet; bench.candidates times them.

A candidate is a file of this folder: a file of csrc/cuda/attention with macros that change its main
loop. What a GPU shows to be faster becomes the loop of that file, and a candidate goes with its
macros either way. `python -m bench.candidate_kernels` compiles all of them; no GPU is needed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bench.environment import REPOSITORY

if TYPE_CHECKING:
    from bench.attention_setup import Pass

SOURCES = Path(__file__).parent
CUBINS = REPOSITORY / "build" / "compiled" / "candidates"


class Candidate(NamedTuple):
    """A kernel to time.

    Attributes:
        name: of its source, NAME.cu.
        what: the pass that it changes.
        replaces: the constant of tw_kernels/attention/cuda.py that names the cubin it stands for.
        head_dims: where it differs from that one.
        group: what the number of query heads of a KV head must be a multiple of.
    """

    name: str
    what: Pass
    replaces: str
    head_dims: tuple[int, ...]
    group: int = 1

    @property
    def source(self) -> Path:
        return SOURCES / f"{self.name}.cu"

    @property
    def cubin(self) -> Path:
        """Where it is once it is compiled: named by what it is compiled from."""
        from tw_kernels import cuda_build  # `bench gpu` names candidates before it can be imported

        return CUBINS / f"{self.name}-{cuda_build.cubin_digest(self.source)}.cubin"


CANDIDATES = [
    # The two warpgroups start their products in turns, as those of FlashAttention 3 do.
    Candidate("forward_in_turns", "fwd", "FORWARD_CUBIN", (64, 128)),
    # Two thread blocks, of neighbouring heads of a group, read each tile of K and V once.
    Candidate("forward_in_clusters", "fwd", "FORWARD_CUBIN", (128,), group=4),
    Candidate("forward_in_turns_and_clusters", "fwd", "FORWARD_CUBIN", (128,), group=4),
    # The gradients' products run on while the next scores are started.
    Candidate("dkv_runs_on", "bwd", "BACKWARD_CUBIN", (64,)),
]


def compiled(candidate: Candidate) -> Path:
    """The cubin of a candidate, compiled if it is not there.

    Raises:
        RuntimeError: the compiler failed.
    """
    from tw_kernels import cuda_build

    cubin = candidate.cubin
    if not cubin.exists():
        CUBINS.mkdir(parents=True, exist_ok=True)
        part = cubin.with_suffix(f".{os.getpid()}.part")
        cuda_build.compile_kernels(candidate.source, part)
        part.rename(cubin)
    return cubin
