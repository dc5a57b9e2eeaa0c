"""Every family of causal language models that `transformers` has: right, or refused in one line.

The models are small and random, with weights so large that a mistake shows, and windows shorter
than the sequences.
"""

import re

import pytest
import torch
import transformers

from tests.model.families import (
    FAMILIES,
    UNBUILT,
    VOCABULARY,
    small_model,
    table_row,
    table_rows,
    why_not,
)
from threadweaver.generate import Engine, GenerationSettings
from threadweaver.generate.sampler import SamplingParams
from threadweaver.model import trie_loss
from threadweaver.trajectory import TAGS, Codec
from tw_kernels import Trie

MOST_USED = [
    "cohere2", "gemma2", "gemma3_text", "glm4", "gpt_oss", "granite", "llama", "mistral", "olmo3",
    "phi3", "qwen2", "qwen3_moe",
]  # fmt: skip
MUST_RUN = {
    *MOST_USED, "cohere", "gemma", "mixtral", "olmo2", "qwen2_moe", "qwen3", "smollm3",
}  # fmt: skip
EOS = VOCABULARY - 1
CODEC = Codec.from_vocab(
    {**{tag: 60 + i for i, tag in enumerate(TAGS)}, "\n": 5, "0": 6, ":": 7}, eos_id=EOS
)


def every_family():
    """The most used in every run, all of them in the slow tests."""
    return [
        pytest.param(family, marks=[] if family in MOST_USED else pytest.mark.slow)
        for family in FAMILIES
    ]


@pytest.mark.parametrize("family", every_family())
def test_a_family_is_right_or_refused_as_the_document_says(family):
    reason = why_not(family)
    assert reason is None or family not in MUST_RUN
    assert _without_numbers(table_rows()[family]) == _without_numbers(table_row(family, reason))
    if reason is not None:
        assert "\n" not in reason
        return
    ours, own = small_model(family), small_model(family, "eager")
    _check_training(ours, own)
    _check_decoding(ours, own)


def _without_numbers(row: str) -> str:
    return re.sub(r"[\d.]+(e-?\d+)?", "N", row)


def _check_training(ours, own):
    """The loss of a forest, and its gradients, are those of its paths one by one."""
    ids = torch.randint(1, VOCABULARY - 1, (4, 12), generator=torch.Generator().manual_seed(1))
    ids = ids.tolist()
    paths = [ids[0] + ids[1], ids[0] + ids[2], ids[0] + ids[1][:7] + ids[3], ids[3]]
    trie = Trie.from_paths(paths, [[1.0] * len(path) for path in paths])
    got = trie_loss(ours, trie)
    want, counted = torch.zeros(()), set()
    for path in paths:
        logprobs = own(input_ids=torch.tensor([path]), use_cache=False).logits[0].log_softmax(-1)
        for i in range(1, len(path)):
            if tuple(path[: i + 1]) not in counted:
                counted.add(tuple(path[: i + 1]))
                want = want - logprobs[i - 1, path[i]]
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    got.backward()
    want.backward()
    gradients = {name: p.grad for name, p in own.named_parameters() if p.grad is not None}
    # Some are 0 but for rounding: a bias of keys, a router's of all experts.
    rounding = 1e-6 * max(gradient.norm() for gradient in gradients.values())
    for name, parameter in ours.named_parameters():
        if name in gradients:
            difference = (parameter.grad - gradients[name]).norm()
            assert difference <= 1e-4 * gradients[name].norm() + rounding, name
        else:
            assert parameter.grad is None or not parameter.grad.any(), name


def _check_decoding(ours, own):
    """Greedy decoding through the engine gives the tokens of the library's `generate`."""
    prompts = [[3, 1, 4, 1, 5], [9, 2, 6], [3, 1, 4, 1, 5, 8, 9]]
    engine = Engine(ours, CODEC, page_size=4, num_pages=64)
    greedy = GenerationSettings("sequential", 16, sampling=SamplingParams(temperature=0))
    for prompt in prompts:
        engine.add(prompt, greedy)
    for prompt, rollout in zip(prompts, engine.run(), strict=True):
        want = own.generate(
            torch.tensor([prompt]),
            do_sample=False,
            max_new_tokens=16,
            eos_token_id=EOS,
            pad_token_id=EOS,
        )[0, len(prompt) :]
        assert rollout.response == want.tolist()


def test_the_document_has_every_family_of_the_library_it_names():
    rows = table_rows()
    if transformers.__version__.startswith("5.17."):
        assert set(rows) == set(FAMILIES)
    assert {family for family, row in rows.items() if row.endswith("| runs |")} >= MUST_RUN
    assert UNBUILT.keys() <= rows.keys()
