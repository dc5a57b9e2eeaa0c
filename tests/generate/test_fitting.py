"""Which prompts leave room for a response."""

from __future__ import annotations

from typing import Any

import pytest

from threadweaver.generate import GenerationSettings
from threadweaver.generate.fitting import fitting_prompts
from threadweaver.generate.settings import PromptTooLong
from threadweaver.model import build_tokenizer
from threadweaver.trajectory import Codec as ByteCodec
from threadweaver.trajectory import Rendered

CONTEXT = 10


class Codec:
    check_markup = staticmethod(ByteCodec.from_tokenizer(build_tokenizer()).check_markup)

    def encode_prompt(self, prompt: str) -> list[int]:
        if not prompt.isascii():
            raise ValueError("no text")
        return [1] * len(prompt)


class Engine:
    codec = Codec()
    context_length = CONTEXT

    def check(self, ids: list[int], settings: GenerationSettings) -> int:
        if len(ids) >= CONTEXT:
            raise PromptTooLong(f"the prompt has {len(ids)} tokens")
        return min(settings.max_tokens, CONTEXT - len(ids))


def fit(*prompts: str, most_tokens: int | None = None):
    engine: Any = Engine()
    named = [(f"f.jsonl, row {i}", prompt) for i, prompt in enumerate(prompts, 1)]
    settings = GenerationSettings(mode="sequential", max_tokens=4)
    return fitting_prompts(engine, named, settings, most_tokens)


def test_prompts_that_leave_no_room_are_skipped_and_counted_and_lines_say_so():
    assert fit("abc", "ab") == ({0: [1, 1, 1], 1: [1, 1]}, 0, [])
    found = fit("x" * 10, "abc", "x" * 11, "x" * 8)
    assert list(found.ids) == [1, 3] and found.skipped == 2
    skipped, ends = found.notes
    assert skipped.startswith(
        "2 of 4 prompts are skipped: f.jsonl, row 1: the prompt has 10 tokens"
    )
    assert ends.startswith("max_tokens: 2 and not 4")
    found = fit("abc", "abcd", most_tokens=4)
    assert list(found.ids) == [0] and "a path at most 4" in found.notes[0]


def test_a_prompt_that_cannot_be_decoded_is_named_and_so_is_the_first_if_none_fits():
    with pytest.raises(ValueError, match=r"f\.jsonl, row 2: no text") as error:
        fit("abc", "é")
    assert not isinstance(error.value, PromptTooLong)
    with pytest.raises(PromptTooLong, match=r"none of 2 prompts leaves room .*, row 1: the"):
        fit("x" * 10, "x" * 11)


def test_a_prompt_in_the_markup_of_another_model_is_an_error_and_not_text():
    with pytest.raises(ValueError, match=r"f\.jsonl, row 2: .*<\|x_y\|>, a control token of an"):
        fit("<|x_y|>", Rendered("<|x_y|>"))
