from dataclasses import replace
from itertools import islice
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AddedToken

from threadweaver.data import DataError, Example, example_of
from threadweaver.model import build_tokenizer
from threadweaver.tasks.multiplication import question, trajectory
from threadweaver.train.batches import (
    PACKING_WINDOW,
    all_steps,
    build_tries,
    epoch_steps,
    pack,
    unrolled_tokens,
)
from threadweaver.train.config import DataConfig, OptimizationConfig
from threadweaver.trajectory import Codec, extract_calls
from tw_kernels import Trie

CODEC = Codec.from_tokenizer(build_tokenizer())
SIZES = st.lists(st.integers(1, 50), min_size=1, max_size=80)


def example(parallel: bool = True, line: int = 1) -> Example:
    factors = (47, 86)
    return Example(question(factors), trajectory(factors, parallel), "4042", f"data.jsonl:{line}")


@given(SIZES)
def test_packs_hold_every_trie_once_within_the_budget(sizes):
    packs = pack(sizes, range(len(sizes)), 50)
    assert sorted(i for p in packs for i in p) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in p) <= 50 for p in packs)


@given(SIZES)
def test_packs_are_first_fit_decreasing(sizes):
    packs = pack(sizes, range(len(sizes)), 50)
    # No pack could have taken the largest trie of a later one when that was placed.
    for b, later in enumerate(packs):
        largest = sizes[later[0]]
        for earlier in packs[:b]:
            assert sum(s for i in earlier if (s := sizes[i]) >= largest) + largest > 50


@given(SIZES, st.integers(1, 4), st.integers(0, 3))
def test_an_epoch_takes_every_trie_once(sizes, accumulation, epoch):
    settings = OptimizationConfig(batch_tokens=50, accumulation=accumulation)
    steps = epoch_steps(sizes, settings, seed=1, epoch=epoch)
    taken = [i for step in steps for micro in step.micro_batches for i in micro]
    assert sorted(taken) == list(range(len(sizes)))
    assert [len(s.micro_batches) == accumulation for s in steps[:-1]] == [True] * (len(steps) - 1)
    assert [s.ends_epoch for s in steps] == [False] * (len(steps) - 1) + [True]


def test_an_epoch_larger_than_the_packing_window_still_takes_every_trie_once():
    sizes = [7] * (3 * PACKING_WINDOW)
    steps = epoch_steps(sizes, OptimizationConfig(batch_tokens=10), seed=0, epoch=0)
    assert sorted(s.micro_batches[0][0] for s in steps) == list(range(len(sizes)))


def test_the_order_is_a_function_of_seed_and_epoch():
    settings = OptimizationConfig(batch_tokens=50)
    sizes = list(range(1, 50))
    first = epoch_steps(sizes, settings, seed=0, epoch=0)
    assert first == epoch_steps(sizes, settings, seed=0, epoch=0)
    packs = [sorted(map(tuple, s.micro_batches)) for s in first]
    for other in (
        epoch_steps(sizes, settings, seed=0, epoch=1),
        epoch_steps(sizes, settings, seed=1, epoch=0),
    ):
        assert packs != [sorted(map(tuple, s.micro_batches)) for s in other]


def test_max_steps_overrides_epochs_and_goes_on_into_new_epochs():
    settings = OptimizationConfig(batch_tokens=10, epochs=2)
    per_epoch = len(epoch_steps([10] * 4, settings, 0, 0))
    assert all_steps([10] * 4, settings, 0)[0] == 2 * per_epoch
    settings.max_steps = 11
    total, steps = all_steps([10] * 4, settings, 0)
    assert total == 11
    assert [s.epoch for s in islice(steps, total)] == [0] * 4 + [1] * 4 + [2] * 3


@pytest.mark.parametrize("loss", ["response", "completions"])
def test_loss_stands_on_the_response_and_its_end_token(loss):
    built = build_tries([example()], CODEC, DataConfig("f", loss=loss), 4096)
    [trie] = built.tries
    with_loss = trie.columns["weights"] > 0
    prompt_length = len(CODEC.encode_prompt(example().prompt))
    assert not with_loss[trie.positions < prompt_length].any()
    assert with_loss[trie.tokens == CODEC.eos_id].tolist() == [True]
    # Every thread is a completion; its copy in the joined path carries loss for `response` only.
    closes = trie.tokens == CODEC.tag_ids["</Thread>"]
    assert int((with_loss & closes).sum()) == {"response": 3, "completions": 2}[loss]


def test_a_prompt_rendered_for_another_model_is_named_and_its_own_markup_is_not():
    tokenizer = build_tokenizer()
    own = AddedToken("<|im_end|>", special=True)
    tokenizer.add_tokens([own, AddedToken("<|file_sep|>")], special_tokens=False)
    codec, good = Codec.from_tokenizer(tokenizer), example()
    for text, control in (
        ("<|im_end|><|file_sep|>q", None),
        ("<|im_end|>\n<|eot_id|>q", "<|eot_id|>"),
        ("<｜User｜>q", "<｜User｜>"),  # noqa: RUF001
    ):
        # A user's words are text; so is a question, which stays as it is.
        build_tries([replace(good, prompt=text)], codec, DataConfig("f"), 4096)
        row = {"qwen_text": f"{text}{good.response}"}
        rendered = example_of(row, "data.jsonl:3", codec=codec)
        assert rendered.prompt == text
        if control is None:
            assert build_tries([rendered], codec, DataConfig("f"), 4096).tries
            continue
        with pytest.raises(DataError) as error:
            build_tries([rendered], codec, DataConfig("f"), 4096)
        assert str(error.value) == (
            f"data.jsonl:3: the prompt holds {control}, a control token of another model, which is "
            "mere text to this one: give the row's question and response in fields of their own"
        )


def test_unrolled_tokens_are_those_of_the_maximal_paths():
    [trie] = build_tries([example()], CODEC, DataConfig("f"), 4096).tries
    calls = extract_calls(
        [*CODEC.encode(f"{example().prompt}{example().response}"), CODEC.eos_id], CODEC
    )
    paths = [tuple(call.path) for call in calls]
    maximal = {p for p in paths if not any(q != p and q[: len(p)] == p for q in paths)}
    assert unrolled_tokens(trie) == sum(map(len, maximal))
    assert unrolled_tokens(Trie.pack([trie, trie])) == 2 * unrolled_tokens(trie)


def test_a_trajectory_over_the_budget_loses_whole_calls_from_its_end():
    whole = build_tries([example()], CODEC, DataConfig("f"), 4096)
    cut = build_tries([example()], CODEC, DataConfig("f"), len(whole.tries[0]) - 1)
    assert (whole.dropped_calls, cut.dropped_calls) == (0, 1)
    [shorter], [trie] = cut.tries, whole.tries
    assert shorter.num_paths == trie.num_paths - 1
    for i in range(shorter.num_paths):
        kept, had = shorter.path_nodes(i), trie.path_nodes(i)
        assert torch.equal(shorter.tokens[kept], trie.tokens[had])


def test_a_trie_over_the_budget_with_its_first_call_alone_is_named_by_file_and_line():
    with pytest.raises(DataError, match=r"^data\.jsonl:7: .*over the budget of 20.*batch_tokens"):
        build_tries([example(), example(line=7)][1:], CODEC, DataConfig("f"), 20)


def broken(line: int) -> Example:
    whole = example(line=line)
    text = whole.response.replace("<Thread>\n2:", "<Thread>\n3:")
    return Example(whole.prompt, text, whole.ground_truth, whole.source)


def test_a_trajectory_that_breaks_the_format_is_named_by_file_and_line_and_rule():
    with pytest.raises(DataError, match=r"^data\.jsonl:2: the response breaks the format: .*3"):
        build_tries([example(), broken(2)], CODEC, DataConfig("f"), 4096)


def test_malformed_trajectories_are_dropped_and_counted_if_asked():
    settings = DataConfig("f", malformed="drop")
    built = build_tries([broken(1), example(line=2)], CODEC, settings, 4096)
    assert (built.sources, built.dropped_trajectories) == (["data.jsonl:2"], 1)


def test_a_think_tag_that_the_prompt_opens_counts_for_the_format():
    whole = example()
    moved = Example(
        f"{whole.prompt}<think>\n", whole.response.removeprefix("<think>\n"), "4042", "f:1"
    )
    (trie,) = build_tries([moved], CODEC, DataConfig("f"), 4096).tries
    # Opened twice is opened once.
    twice = Example(moved.prompt, whole.response, "4042", "f:1")
    (same,) = build_tries([twice], CODEC, DataConfig("f"), 4096).tries
    assert same.tokens.tolist() == trie.tokens.tolist()


def test_the_fingerprint_tells_data_and_loss_apart():
    def prints(examples, loss: Literal["response", "completions"] = "response"):
        return build_tries(examples, CODEC, DataConfig("f", loss=loss), 4096).fingerprint

    assert prints([example()]) == prints([example(line=9)])
    different = {prints([example()]), prints([example(False)]), prints([example()] * 2)}
    assert len(different | {prints([example()], "completions")}) == 4


def test_blocks_nest_as_deep_as_the_settings_say():
    def block(*threads: str) -> str:
        outlines = "".join(f"<Outline>{n}: o</Outline>\n" for n, _ in enumerate(threads, 1))
        bodies = "".join(f"<Thread>\n{n}: {text}</Thread>" for n, text in enumerate(threads, 1))
        return f"<Parallel>\n<Outlines>\n{outlines}</Outlines>\n{bodies}\n</Parallel>\n"

    text = f"<think>\n{block('a', block('b', 'c') + 'd')}</think>\n\\boxed{{7}}"
    nested = Example("1?\n", text, "7", "data.jsonl:1")
    with pytest.raises(DataError, match=r"^data\.jsonl:1: the response breaks the format"):
        build_tries([nested], CODEC, DataConfig("f"), 4096)
    (trie,) = build_tries([nested], CODEC, DataConfig("f", max_depth=2), 4096).tries
    ids = [*CODEC.encode(f"{nested.prompt}{text}"), CODEC.eos_id]
    paths = [call.path for call in extract_calls(ids, CODEC, 3, max_depth=2)]
    assert [trie.tokens[trie.path_nodes(i)].tolist() for i in range(trie.num_paths)] == paths
    assert len(paths) == 7  # of two blocks: before, each of four threads, between, after


def test_a_control_token_within_a_response_is_named_by_file_and_line():
    whole = example(line=3)
    text = whole.response.replace("</think>", "<|endoftext|></think>")
    with pytest.raises(DataError, match=r"^data\.jsonl:3: the response holds the control token <"):
        build_tries([Example(whole.prompt, text, None, whole.source)], CODEC, DataConfig("f"), 4096)
