"""Step 5: each rule of what is kept has a response that breaks it."""

from __future__ import annotations

import pytest

from tests.trajectory.byte_tokenizer import byte_tokenizer
from threadweaver.annotate.cut import Block, marked_up
from threadweaver.annotate.failures import LeftOut
from threadweaver.annotate.keep import kept_row
from threadweaver.model import add_tags
from threadweaver.tasks import Problem
from threadweaver.trajectory import Codec, Rendered, TemplateConfig, path_lengths

TOKENIZER = byte_tokenizer()
add_tags(TOKENIZER)
CODEC = Codec.from_tokenizer(TOKENIZER)
PROBLEM = Problem("How many?", "7", "data.jsonl:3")
BLOCK = Block(["one\n", "two and more\n"], "one\ntwo and more\n", ["the one", "the other"])
GOOD = f"<think>\nHm.\n{marked_up([BLOCK])}So.\n</think>\n\\boxed{{7}}"


def test_a_row_has_the_columns_of_sft_and_the_path_metrics():
    row = kept_row(PROBLEM, GOOD, True, CODEC)
    lengths = path_lengths(CODEC.encode(GOOD), CODEC)
    assert row == {
        "question": "How many?",
        "response": GOOD,
        "qwen_text": f"How many?{GOOD}",
        "reward_model": {"ground_truth": "7", "style": "rule"},
        "source": "data.jsonl:3",
        **lengths.as_dict(),
    }
    assert lengths.blocks == 1 and lengths.acceleration > 0


@pytest.mark.parametrize(
    ("response", "is_right", "reason"),
    [
        (GOOD.replace("<Outline>2:", "<Outline>3:"), True, "breaks the format"),
        (GOOD.replace("two and", "two <b>and"), True, "breaks the format"),
        ("<think>\nHm.\n</think>\n\\boxed{7}", True, "nothing parallel is left"),
        (GOOD, False, "the answer is not right any more"),
    ],
)
def test_what_breaks_a_rule_is_left_out(response, is_right, reason):
    with pytest.raises(LeftOut, match=reason) as caught:
        kept_row(PROBLEM, response, is_right, CODEC)
    assert caught.value.step == "5-keep"


def test_thinking_that_the_prompt_opens_is_not_opened_again():
    codec = Codec.from_tokenizer(TOKENIZER, template=TemplateConfig(use="none"))
    problem = Problem(Rendered("How many?<think>\n"), "7", "data.jsonl:3")
    row = kept_row(problem, GOOD, True, codec)
    assert row["response"] == GOOD.removeprefix("<think>\n")
    assert kept_row(problem, row["response"], True, codec) == row
