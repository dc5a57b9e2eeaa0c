"""transformers as a peer of rollouts: `generate`, and continuous batching."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from bench.rollout_cases import Trajectory
from bench.rollout_setup import CONTINUOUS, Generated, RolloutSetup
from bench.suite import Peer

GENERATE = "transformers generate"
MOST_BATCHED = 64  # requests in a batch
MOST_TOKENS = 2**31 - 1  # of a response: no limit
# Of continuous batching: tokens of a page (FlashAttention-2 takes multiples of 256), and of a step.
BLOCK_SIZE, STEP_TOKENS = 256, 1024


class Recorded:
    """A logits processor that makes greedy decoding choose recorded tokens.

    Args:
        tokens: int64 [rows, longest response].
        width: of the padded prompts, in tokens.
    """

    def __init__(self, tokens: Tensor, width: int):
        self._tokens, self._width = tokens, width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        at = input_ids.shape[1] - self._width
        return scores.scatter_(1, self._tokens[:, at : at + 1], torch.inf)


def generate(setup: RolloutSetup, most_seconds: float | None = None) -> Callable[[int], Generated]:
    """`most_seconds`: a call makes only the first tokens of each response, as many as a first call
    made in this time; default: whole responses."""
    model: Any = setup.language.model  # pyright takes `generate` for the module of that name
    eos, device = setup.language.codec.eos_id, model.device

    def batch(
        part: list[Trajectory], most_tokens: int | None = None, most_seconds: float | None = None
    ) -> Callable[[], list[list[int]]]:
        width = max(len(t.prompt) for t in part)
        longest = min(max(len(t.response) for t in part), most_tokens or MOST_TOKENS)
        ids = torch.tensor([[eos] * (width - len(t.prompt)) + t.prompt for t in part])
        mask = torch.tensor([[0] * (width - len(t.prompt)) + [1] * len(t.prompt) for t in part])
        responses = [t.response[:longest] for t in part]
        tokens = torch.tensor([r + [eos] * (longest - len(r)) for r in responses])
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        processors = LogitsProcessorList([Recorded(tokens.to(device), width)])
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=longest,
            max_time=most_seconds,
            eos_token_id=eos,
            pad_token_id=eos,
        )

        def run() -> list[list[int]]:
            out = model.generate(**inputs, generation_config=config, logits_processor=processors)
            rows = out[:, width:].tolist()
            return [row[: row.index(eos) + 1] if eos in row else row for row in rows]

        return run

    all_ = setup.trajectories
    parts = [all_[i : i + MOST_BATCHED] for i in range(0, len(all_), MOST_BATCHED)]
    most = None
    if most_seconds is not None:
        model.set_attn_implementation("sdpa")
        most = max(map(len, batch(parts[0], most_seconds=most_seconds)()))
    batches = [batch(part, most) for part in parts]
    steps = sum(min(max(len(t.response) for t in part), most or MOST_TOKENS) for part in parts)

    def call(_: int) -> Generated:
        model.set_attn_implementation("sdpa")
        return Generated([response for run in batches for response in run()], steps, [])

    return call


def _why_not_continuous(device: str) -> str | None:
    if hasattr(transformers, "ContinuousBatchingConfig"):
        return None
    return f"transformers {transformers.__version__} has no ContinuousBatchingConfig"


def _continuous(setup: RolloutSetup) -> Callable[[int], Generated]:
    model: Any = setup.language.model
    trajectories = setup.trajectories
    longest = max(len(t.prompt) + len(t.response) for t in trajectories)
    at_once = min(MOST_BATCHED, len(trajectories))
    model.set_attn_implementation("sdpa")  # the manager replaces it with its paged form
    manager = model.init_continuous_batching(
        GenerationConfig(
            do_sample=False, eos_token_id=-1, pad_token_id=setup.language.codec.eos_id
        ),
        transformers.ContinuousBatchingConfig(
            block_size=BLOCK_SIZE,
            num_blocks=at_once * -(-longest // BLOCK_SIZE),
            max_batch_tokens=STEP_TOKENS,
            max_requests_per_batch=at_once,
            allow_block_sharing=False,  # else a call would reuse the prompts of the previous one
        ),
    )
    attention = model.config._attn_implementation
    manager.start()
    setup.servers.callback(manager.stop)

    def call(_: int) -> Generated:
        model.set_attn_implementation(attention)
        before = getattr(manager, "current_batch", 0)  # set when the manager's thread has started
        ids = [manager.add_request(t.prompt, max_new_tokens=len(t.response)) for t in trajectories]
        responses = {}
        while len(responses) < len(ids):
            result = manager.get_result(timeout=1)
            if result is not None and result.error:
                raise RuntimeError(result.error)
            if result is None and not manager.is_running():
                raise RuntimeError("its thread ended")
            if result is not None and result.is_finished():
                responses[result.request_id] = result.generated_tokens
        return Generated([responses[id_] for id_ in ids], manager.current_batch - before, [])

    return call


PEERS: list[Peer[RolloutSetup]] = [
    Peer(GENERATE, generate),
    Peer(CONTINUOUS, _continuous, why_absent=_why_not_continuous),
]
