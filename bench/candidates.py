"""CUDA attention kernels that no figure has chosen yet (bench/candidate_kernels), beside those that
run: `python -m bench.candidates --help`. Columns are those of bench.attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from bench import attention
from bench.attention_setup import OURS, AttentionSetup
from bench.candidate_kernels import CANDIDATES, Candidate, compiled
from bench.running import suite_main
from bench.suite import Peer, Skip
from tw_kernels import cuda_build, trie_attention
from tw_kernels.attention import cuda


def _prepare(setup: AttentionSetup, candidate: Candidate) -> Callable[[int], Any]:
    inputs = [setup.inputs(i) for i in range(setup.input_sets)]
    q, k, v, _ = inputs[0]
    if setup.what != candidate.what or q.shape[-1] not in candidate.head_dims:
        raise Skip("the kernel that runs is the same there")
    if reason := cuda.why_not(q, k, v, setup.problem.window):
        raise Skip(reason)
    if q.shape[1] // k.shape[1] % candidate.group:
        raise Skip(f"the query heads of a KV head are not a multiple of {candidate.group}")
    kept, cubin = getattr(cuda, candidate.replaces), compiled(candidate)
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
    return cuda.why_not(q, q, q) or cuda_build.why_not()


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
