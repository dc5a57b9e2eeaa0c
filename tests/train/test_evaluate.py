"""Solving problems with a model: what is decoded and how it is graded."""

import pytest
import torch
from transformers import PreTrainedModel

from threadweaver.data import Example
from threadweaver.eval import evaluate_autoregressive
from threadweaver.model import ATTENTION, new_model
from threadweaver.tokenizer import build_tokenizer
from threadweaver.trajectory import Codec

from .conftest import ARCH

TOKENIZER = build_tokenizer()
CODEC = Codec.from_tokenizer(TOKENIZER)
PROMPTS = ["3*4=?\n", "12*7=?\n", "123*45=?\n", "9*9=?\n", "1*1*1*1=?\n"]


def examples(ground_truth: str | None = "1") -> list[Example]:
    return [Example(p, "", ground_truth, f"f:{i}") for i, p in enumerate(PROMPTS, 1)]


def plain_model() -> PreTrainedModel:
    model = new_model(TOKENIZER, ARCH, seed=3)
    assert model.config._attn_implementation == ATTENTION
    model.set_attn_implementation("sdpa")
    # Rows far apart, so that no two continuations are near a tie.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return model.eval()


def solve(model, batch_size=5, examples=examples(), is_correct=lambda *_: True):  # noqa: B008
    return evaluate_autoregressive(
        model, TOKENIZER, examples, is_correct, max_new_tokens=12, batch_size=batch_size
    )


def greedy(model: PreTrainedModel, prompt: str) -> list[int]:
    """One sequence, no cache, no padding: the definition."""
    ids = CODEC.encode(prompt)
    for _ in range(12):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits
        ids.append(int(logits[0, -1].argmax()))
        if ids[-1] == CODEC.eos_id:
            break
    return ids[len(CODEC.encode(prompt)) :]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_padded_batches_decode_what_single_prompts_do(batch_size):
    model = plain_model()
    expected = [greedy(model, prompt) for prompt in PROMPTS]
    assert len({tuple(ids) for ids in expected}) > 1
    result = solve(model, batch_size)
    assert result.responses == [CODEC.decode(ids) for ids in expected]
    assert result.tokens == sum(map(len, expected))


def test_an_answer_ends_before_its_end_token():
    model = plain_model()
    last = greedy(model, PROMPTS[0])[0]
    # The most likely first token becomes the end token.
    with torch.no_grad():
        rows = next(model.parameters())
        rows[[last, CODEC.eos_id]] = rows[[CODEC.eos_id, last]]
    result = solve(model, examples=examples()[:1])
    assert greedy(model, PROMPTS[0]) == [CODEC.eos_id]
    assert (result.responses, result.tokens) == ([""], 1)


def test_accuracy_and_format_are_shares_of_the_answers():
    truths = []

    def second_is_right(response, truth):
        truths.append(truth)
        return len(truths) == 2

    model = plain_model()
    result = solve(model, is_correct=second_is_right)
    assert truths == ["1"] * 5
    assert result.accuracy == 1 / 5
    assert result.format_correct == 1.0
    opened = [Example("<think>", "", "1", "f:1")]
    assert solve(model, examples=opened).format_correct == 0.0


def test_an_example_without_a_ground_truth_is_named():
    with pytest.raises(ValueError, match=r"^f:1: .*ground_truth"):
        solve(plain_model(), examples=examples(None))
