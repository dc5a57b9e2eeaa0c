"""CUDA attention kernels that no figure has chosen yet, beside those that run:
`python -m bench.candidates --help`.

A candidate is a file of bench/candidate_kernels: a file of csrc/cuda/attention with macros that
change its main loop. What a GPU shows to be faster becomes the loop of that file, and a candidate
goes with its macros either way. Columns are those of bench.attention.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import attention
from bench.attention_setup import OURS, AttentionSetup, Pass
from bench.environment import REPOSITORY
from bench.running import suite_main
from bench.suite import Peer, Skip
from tw_kernels import cuda_build, trie_attention
from tw_kernels.attention import cuda

SOURCES = Path(__file__).with_name("candidate_kernels")
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
        """Where it is once it is compiled; named by what it is compiled from."""
        state = hashlib.sha256(self.source.read_bytes())
        for path in sorted((cuda_build.SOURCES / "cuda").rglob("*")):
            if path.suffix in (".cu", ".h"):
                state.update(path.read_bytes())
        return CUBINS / f"{self.name}-{state.hexdigest()[:16]}.cubin"


CANDIDATES = [
    # The two warpgroups start their products in turns, as those of FlashAttention 3 do.
    Candidate("forward_in_turns", "fwd", "FORWARD_CUBIN", (64, 128)),
    # Two thread blocks, of neighbouring heads of a group, read each tile of K and V once.
    Candidate("forward_in_clusters", "fwd", "FORWARD_CUBIN", (128,), group=4),
    Candidate("forward_in_turns_and_clusters", "fwd", "FORWARD_CUBIN", (128,), group=4),
    # The gradients' products run on while the next scores are started.
    Candidate("dkv_runs_on", "bwd", "BACKWARD_CUBIN", (64,)),
]


def compile_candidates() -> None:
    """Compiles those that are not there, side by side.

    Raises:
        RuntimeError: the compiler failed.
    """
    missing = [candidate for candidate in CANDIDATES if not candidate.cubin.exists()]
    CUBINS.mkdir(parents=True, exist_ok=True)

    def compile_one(candidate: Candidate) -> None:
        part = candidate.cubin.with_suffix(f".{os.getpid()}.part")
        cuda_build.compile_kernels(candidate.source, part)
        part.rename(candidate.cubin)

    with ThreadPoolExecutor() as pool:
        list(pool.map(compile_one, missing))


def _prepare(setup: AttentionSetup, candidate: Candidate) -> Callable[[int], Any]:
    inputs = [setup.inputs(i) for i in range(setup.input_sets)]
    q, k, v, _ = inputs[0]
    if setup.what != candidate.what or q.shape[-1] not in candidate.head_dims:
        raise Skip("the kernel that runs is the same there")
    if reason := cuda.why_not(q, k, v, setup.problem.window):
        raise Skip(reason)
    if q.shape[1] // k.shape[1] % candidate.group:
        raise Skip(f"the query heads of a KV head are not a multiple of {candidate.group}")
    compile_candidates()
    kept, cubin = getattr(cuda, candidate.replaces), candidate.cubin
    attend = partial(trie_attention, layout=setup.layout, backend="cuda")

    def call(i: int) -> Any:
        setattr(cuda, candidate.replaces, cubin)
        try:
            return setup.run(attend, *inputs[i])
        finally:
            setattr(cuda, candidate.replaces, kept)

    return call


def _why_absent(candidate: Candidate, device: str) -> str | None:
    q = torch.empty(1, 1, 64, dtype=torch.bfloat16, device=device)
    return cuda.why_not(q, q, q) or (None if candidate.cubin.exists() else cuda_build.why_not())


def _peer(candidate: Candidate) -> Peer[AttentionSetup]:
    prepare = partial(_prepare, candidate=candidate)
    why_absent = partial(_why_absent, candidate)
    return Peer(f"candidate: {candidate.name}", prepare, True, why_absent)


SUITE = replace(
    attention.SUITE,
    name="candidates",
    peers=[
        next(peer for peer in attention.SUITE.peers if peer.name == OURS),
        *map(_peer, CANDIDATES),
    ],
    versus={OURS: "x ours"},
)

if __name__ == "__main__":
    raise SystemExit(suite_main(SUITE))
