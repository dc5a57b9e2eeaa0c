"""Whole rollouts, ours against `transformers`: `python -m bench.rollout --help`.

Every row but that of continuous batching generates the same recorded tokens: they replace the
sampled ones after logits, samples and log-probabilities have been computed. So the result does not
depend on what the model would generate.

    ours, parallel          threads at the same time
    ours, sequential        one token after another, tags included
    transformers generate   likewise, on the same weights: padded batches of at most 64 requests, in
                            order, each finished with its longest response; greedy and without
                            log-probabilities, its cheapest form
    transformers continuous batching
                            as many tokens, but of its own choice: they cannot be replaced. At most
                            64 requests at once; starting the server is not timed

    fork-join-N       N requests: a prompt of 64 tokens, four threads of 64, some text around them
    multiplication    problems of threadweaver.tasks, or the rows of --replay FILE
    mixed-256         256 requests, prompts of 8 to 64 tokens and responses of 8 to 256, through 64
                      slots of the model of configs/sft-demo.yaml, untrained

    tok/s         tokens of the responses, forced ones included, over the time
    steps         forward passes; ms/step: mean time of one
    latency x     tokens of the responses / tokens on their longest paths
    of latency    speedup over ours, sequential, as a share of latency x
    x seq, x generate, x cont.
                  how many times faster than ours, sequential; than transformers
    time %        model without attention / attention / plan / orchestration / sampling
    mean, max Δ   |Δ log p| of the sampled tokens against the trie trainer's forward pass, over
                  the first few requests
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.rollout_cases import Language, fork_join, mixed, multiplication, replayed
from bench.rollout_peers import GENERATE, PEERS
from bench.rollout_setup import CONTINUOUS, Generated, RolloutSetup
from bench.running import suite_main
from bench.suite import Options, Peer, Row, Skip, Suite, at_least_one
from threadweaver.device import Precision, resolve
from threadweaver.generate.engine import Engine
from threadweaver.generate.weaver import Mode
from threadweaver.model import ATTENTION

PARALLEL, SEQUENTIAL = "ours, parallel", "ours, sequential"
PAGE_SIZE = 16


@dataclass
class RolloutOptions(Options):
    """Options of bench.rollout, in addition to those of every benchmark.

    Args:
        model: of all cases but mixed: smollm2, a Hugging Face folder, or tiny, the model of
            configs/sft-demo.yaml, untrained. Default: smollm2, with --quick tiny.
        dtype: of weights, keys and values; auto: bf16 where the device multiplies it, else fp32.
        replay: file of recorded trajectories to use instead of multiplication; columns as in
            training data.
        rows: how many of them, from the first.
        batch: requests of the larger fork-join case. Default: 64, on a CPU 8.
    """

    model: str | None = None
    dtype: Precision = "auto"
    replay: Path | None = None
    rows: int = 8
    batch: int | None = None


def _ours(peer: str, mode: Mode) -> Peer[RolloutSetup]:
    """Our engine in a mode."""

    def prepare(setup: RolloutSetup) -> Callable[[int], Generated]:
        if mode == "parallel" and setup.latency_speedup == 1:
            raise Skip("no request forks")
        language, scripts = setup.language, setup.scripts(mode)
        # Text of threads is held twice: on its thread's path, and in the joined context.
        tokens = sum(len(t.prompt) + 2 * len(t.response) for t, _, _ in scripts)
        completions = sum(len(script) for _, _, script in scripts)
        engine = setup.engines[peer] = Engine(
            language.model,
            language.codec,
            page_size=PAGE_SIZE,
            num_pages=tokens // PAGE_SIZE + 2 * completions,
            max_sequences=setup.case.slots,
        )

        def call(_: int) -> Generated:
            language.model.set_attn_implementation(ATTENTION)
            steps = []
            for t, settings, script in scripts:
                engine.add(t.prompt, settings, script=script)
            rollouts = engine.run(steps.append)
            return Generated([r.response for r in rollouts], len(steps), rollouts)

        return call

    return Peer(peer, prepare, ours=True)


def setups(options: RolloutOptions) -> Iterator[RolloutSetup]:
    at_least_one(options, "rows", "batch")
    name = options.model or ("tiny" if options.quick else "smollm2")
    precision = resolve(options.dtype, torch.device(options.device))
    language = Language(name, precision, options.device)
    tiny = language if name == "tiny" else Language("tiny", precision, options.device)
    if options.model:
        _ = language.model  # a missing model must be reported before any suite runs
    if options.replay:
        recorded = RolloutSetup(replayed(options.replay, options.rows), language)
        recorded.scripts("parallel")  # so must a row that cannot be replayed
    elif options.quick:
        recorded = RolloutSetup(multiplication(1, digits=(1, 2)), language)
    else:
        recorded = RolloutSetup(multiplication(options.rows), language)
    if options.quick:
        yield RolloutSetup(fork_join(options.batch or 1, threads=2, length=16), language)
        yield recorded
        yield RolloutSetup(mixed(8, 4, 32), tiny)
        return
    yield RolloutSetup(fork_join(1), language)
    yield RolloutSetup(fork_join(options.batch or (8 if options.device == "cpu" else 64)), language)
    yield recorded
    yield RolloutSetup(mixed(256, 64, 256), tiny)


def relate(rows: dict[str, Row]) -> None:
    if PARALLEL in rows and SEQUENTIAL in rows:
        row = rows[PARALLEL]
        row["of_latency"] = row["ratios"][SEQUENTIAL] / row["latency_speedup"]


OURS = [_ours(PARALLEL, "parallel"), _ours(SEQUENTIAL, "sequential")]
COLUMNS = {
    "tokens_per_second": "tok/s",
    "steps": "steps",
    "ms_per_step": "ms/step",
    "latency_speedup": "latency x",
    "of_latency": "of latency",
    "shares": "time %",
    "mean_mismatch": "mean Δ",
    "max_mismatch": "max Δ",
}

SUITE = Suite(
    name="rollout",
    options=RolloutOptions,
    setups=setups,
    peers=[*OURS, *PEERS],
    columns=COLUMNS,
    versus={SEQUENTIAL: "x seq", GENERATE: "x generate", CONTINUOUS: "x cont."},
    relate=relate,
)

if __name__ == "__main__":
    raise SystemExit(suite_main(SUITE))
