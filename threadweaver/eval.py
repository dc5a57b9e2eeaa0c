"""Solving problems with a trained model: decode, grade, count."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from threadweaver.data import Example
from threadweaver.trajectory import Codec, check_format


@dataclass(frozen=True)
class Evaluation:
    """What came of solving problems.

    Attributes:
        responses: the text of each, without the end token.
        accuracy: share whose answer is right.
        format_correct: share that is well formed.
        tokens: generated, end tokens included.
        seconds: wall-clock.
    """

    responses: list[str]
    accuracy: float
    format_correct: float
    tokens: int
    seconds: float


def evaluate_autoregressive(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    is_correct: Callable[[str, str], bool],
    *,
    max_new_tokens: int,
    batch_size: int,
) -> Evaluation:
    """Greedy answers, one token after another, with no threads run in parallel.

    Args:
        model: a plain transformers model, loaded with an ordinary attention (sdpa).
        examples: prompts with ground truths; at least one.
        is_correct: (response, ground truth) -> whether it is right.
        max_new_tokens: where an answer without an end is cut.
        batch_size: prompts decoded at once.

    Raises:
        ValueError: an example has no ground truth; names its file and line.
    """
    truths = [ground_truth(example) for example in examples]
    codec = Codec.from_tokenizer(tokenizer)
    start = time.perf_counter()
    answers: list[list[int]] = []
    prompts = [codec.encode(example.prompt) for example in examples]
    for i in range(0, len(prompts), batch_size):
        answers += _decode(model, prompts[i : i + batch_size], codec.eos_id, max_new_tokens)
    responses = [codec.decode([i for i in ids if i != codec.eos_id]) for ids in answers]
    right = [is_correct(text, truth) for text, truth in zip(responses, truths, strict=True)]
    well_formed = [
        not violations(example.prompt, text)
        for example, text in zip(examples, responses, strict=True)
    ]
    return Evaluation(
        responses,
        accuracy=sum(right) / len(right),
        format_correct=sum(well_formed) / len(well_formed),
        tokens=sum(map(len, answers)),
        seconds=time.perf_counter() - start,
    )


def violations(prompt: str, response: str) -> list[str]:
    """What is wrong with a response's format, a <think> that the prompt ends with included."""
    opened = "<think>" if prompt.rstrip().endswith("<think>") else ""
    return check_format(opened + response)


def ground_truth(example: Example) -> str:
    """The right answer of an example; ValueError if its row names none."""
    if example.ground_truth is None:
        raise ValueError(
            f"{example.source}: no field 'reward_model.ground_truth'; add the right answer"
        )
    return example.ground_truth


@torch.inference_mode()
def _decode(
    model: PreTrainedModel, prompts: list[list[int]], eos_id: int, max_new_tokens: int
) -> list[list[int]]:
    """Greedy continuations, each up to and including its end token."""
    width = max(map(len, prompts))
    ids = torch.tensor([[eos_id] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(  # pyright: ignore[reportCallIssue] (declared on a mixin as a module)
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=eos_id,
            pad_token_id=eos_id,
        ),
    )
    assert isinstance(out, Tensor)
    return [_through(eos_id, row) for row in out[:, width:].tolist()]


def _through(end: int, ids: list[int]) -> list[int]:
    return ids[: ids.index(end) + 1] if end in ids else ids
