"""One training step on a trie, and without sharing prefixes: `python -m bench.train_step --help`.

Every peer computes the same gradient of the same model: supervised fine-tuning on one trajectory,
or P-GRPO on a group of rollouts of one prompt. It runs one or more passes, forward and backward,
and accumulates the gradients.

    ours: trie                all calls of the trajectory or group as one trie, one pass
    ours: trie per rollout    a trie and a pass for each rollout of the group
    unrolled calls            each call a sequence of its own and a pass of its own
    unrolled calls, packed    each call a sequence of its own, up to 10,240 tokens a pass, without
                              padding, as in the published RL; with our attention
    shared prompt only        likewise, but each pass holds the prefix common to all calls once
    trie, dense mask          the trie, by scaled dot-product attention with a mask of N x N

    tokens        computed in all passes
    token ratio   unrolled tokens / trie tokens: the upper bound of what sharing prefixes saves, if
                  all tokens cost the same
    TFLOP/s       the operations that the trie needs over the time, for every peer alike: 6 for each
                  weight of the layers and token of the trie, and 14 D Hq for each visible pair and
                  layer; without the embedding and the output layer
    x unrolled, x packed   how many times faster than unrolled calls, than packed ones
    of ratio      x unrolled / token ratio
    mem / packed  peak memory over that of the packed calls
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from unittest import mock

from bench import shapes
from bench.running import suite_main
from bench.step_setup import (
    FineTuning,
    Pass,
    PolicyUpdate,
    StepSetup,
    group_passes,
    packed_passes,
    rollout_passes,
    shared_prompt_passes,
    unrolled_passes,
)
from bench.suite import Options, Peer, Row, Skip, Suite

OURS, PER_ROLLOUT = "ours: trie", "ours: trie per rollout"
UNROLLED, PACKED = "unrolled calls", "unrolled calls, packed"
SHARED_PROMPT, DENSE = "shared prompt only", "trie, dense mask"
MOST_DENSE_TOKENS = 16_384


def _peer(
    name: str,
    passes: Callable[[StepSetup], list[Pass]],
    backend: str = "",
) -> Peer[StepSetup]:
    """The passes of an update, trie attention by a backend; default: by its own choice."""

    def prepare(setup: StepSetup) -> Callable[[int], None]:
        steps = passes(setup)
        largest = max(step.tokens for step in steps)
        if backend == "dense" and largest > MOST_DENSE_TOKENS:
            raise Skip(f"{largest:,} tokens: a mask of their square is too large")
        setup.tokens[name] = sum(step.tokens for step in steps)
        _ = setup.expected

        def call(_: int) -> None:
            with mock.patch.dict(os.environ, TW_BACKEND=backend):
                setup.run(steps)

        return call

    return Peer(name, prepare, ours=name in (OURS, PER_ROLLOUT))


def setups(options: Options) -> Iterator[StepSetup]:
    sizes = ((160, 2),) if options.quick else ((512, 2), (2048, 3), (4096, 4), (8192, 5))
    for size in sizes:
        yield FineTuning(shapes.trajectory(*size), options.device)
    if options.quick:
        group = shapes.rollouts(3, blocks=1, threads=3, prompt=24, text=8, thread=(8, 16))
        yield PolicyUpdate(group, "rollouts-3x1x3", options.device)
    else:
        group = shapes.rollouts(8, blocks=2, threads=4, prompt=128, text=32, thread=(32, 64))
        yield PolicyUpdate(group, "rollouts-8x2x4", options.device)


def relate(rows: dict[str, Row]) -> None:
    for row in rows.values():
        if UNROLLED in row["ratios"]:
            row["of_ratio"] = row["ratios"][UNROLLED] / row["token_ratio"]
        if PACKED in rows and row["peak_bytes"]:
            row["memory_of_packed"] = row["peak_bytes"] / rows[PACKED]["peak_bytes"]


SUITE = Suite(
    name="train_step",
    options=Options,
    setups=setups,
    peers=[
        _peer(OURS, group_passes),
        _peer(PER_ROLLOUT, rollout_passes),
        _peer(UNROLLED, unrolled_passes),
        _peer(PACKED, packed_passes),
        _peer(SHARED_PROMPT, shared_prompt_passes),
        _peer(DENSE, group_passes, backend="dense"),
    ],
    columns={"tokens": "tokens", "of_ratio": "of ratio", "memory_of_packed": "mem / packed"},
    versus={UNROLLED: "x unrolled", PACKED: "x packed"},
    relate=relate,
)

if __name__ == "__main__":
    raise SystemExit(suite_main(SUITE))
