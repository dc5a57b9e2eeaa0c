import pickle
import re
from typing import Any

import numpy as np
import pytest
import torch
from byte_tokenizer import byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from trajectories import CODEC, EXAMPLE, VOCAB, Trajectory, trajectories, unhurried
from transformers import AddedToken

from threadweaver.generate import Weaver
from threadweaver.model import add_tags
from threadweaver.trajectory import TAGS, Codec, PathLengths, extract_calls, path_lengths


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = byte_tokenizer()
    add_tags(tokenizer)
    return tokenizer


@pytest.fixture(scope="module")
def codec(tokenizer):
    return Codec.from_tokenizer(tokenizer)


def test_a_tag_is_one_token_anywhere_in_a_text(codec: Codec):
    for tag in TAGS:
        for text in (tag, f"a{tag}b", f" {tag} ", f"\n{tag}\n", f"<{tag}>", tag + tag):
            ids = codec.encode(text)
            assert ids.count(codec.tag_ids[tag]) == text.count(tag)
            assert codec.decode(ids) == text


@unhurried
@given(st.text(max_size=30))
def test_decoding_gives_back_the_text(codec: Codec, text: str):
    for whole in (text, f"{EXAMPLE}{text}<Thread>\n1:{text}</Thread>"):
        assert codec.decode(codec.encode(whole)) == whole


def test_no_token_straddles_the_colon_of_a_thread_header(codec: Codec, tokenizer):
    assert len(tokenizer.encode(":\n")) == 1
    ids = codec.encode("<Thread>\n1:\nwork</Thread>")
    assert ids == [
        codec.tag_ids["<Thread>"],
        *codec.encode("\n1:"),
        *codec.encode("\nwork"),
        codec.tag_ids["</Thread>"],
    ]
    assert codec.encode("a:\n") == tokenizer.encode("a:\n")


@unhurried
@given(trajectories())
def test_calls_agree_whatever_the_tokenizer(codec: Codec, t: Trajectory):
    prompt_ids = codec.encode(t.prompt)
    ids = prompt_ids + codec.encode(t.response.removesuffix("<eos>"))
    calls = extract_calls(ids, codec, len(prompt_ids))
    expected = [(context, completion.removesuffix("<eos>")) for context, completion in t.calls]
    assert [(codec.decode(c.context), codec.decode(c.completion)) for c in calls] == [
        (context, completion) for context, completion in expected if completion
    ]


def test_a_header_straddled_by_a_token_is_context(codec: Codec, tokenizer):
    ids = tokenizer.encode("<Parallel><Outlines></Outlines>\n<Thread>\n1:\nwork</Thread>")
    thread = extract_calls(ids, codec)[1]
    assert codec.decode(thread.context).endswith("<Thread>\n1:\n")
    assert codec.decode(thread.completion) == "work</Thread>"


def test_missing_tags_are_named_with_the_remedy():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([tag for tag in TAGS if tag != "</Thread>"], special_tokens=True)
    with pytest.raises(
        ValueError,
        match=r"no single token for </Thread>: python -m threadweaver\.add_tags --model ",
    ):
        Codec.from_tokenizer(tokenizer)


@pytest.mark.parametrize("make", [Codec.from_tokenizer, Codec.without_tags])
def test_a_tokenizer_without_eos_is_refused(make):
    tokenizer = byte_tokenizer()
    add_tags(tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos_token"):
        make(tokenizer)


@pytest.fixture(scope="module")
def plain_tokenizer():
    return byte_tokenizer()


@unhurried
@given(trajectories())
def test_without_tags_a_tag_is_text_like_any_other(plain_tokenizer, t: Trajectory):
    codec = Codec.without_tags(plain_tokenizer)
    assert codec.tag_ids.keys() == set(TAGS) and max(codec.tags) < 0
    text = t.prompt + t.response.removesuffix("<eos>") + "."
    ids = codec.encode(text)
    assert ids == plain_tokenizer.encode(text) and codec.decode(ids) == text
    [call] = extract_calls(ids, codec)
    assert call.completion == ids
    assert path_lengths(ids, codec) == PathLengths(len(ids), len(ids), 0, 0.0)


def test_half_a_surrogate_pair_is_no_text():
    codec = Codec.without_tags(byte_tokenizer())
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        codec.encode("a\ud800")


def test_without_tags_there_is_no_parallel_mode():
    codec = Codec.without_tags(byte_tokenizer())
    with pytest.raises(ValueError, match='use mode="sequential"'):
        Weaver([1], codec, 10)
    [request] = Weaver([1], codec, 10, mode="sequential").requests()
    assert request.stop_ids == [codec.eos_id]


def test_every_end_id_ends_a_response():
    codec = Codec.from_vocab(VOCAB, eos_id=120, end_ids=[7, 120, 3])
    assert codec.end_ids == (120, 3, 7)
    [request] = Weaver([1], codec, 10, mode="sequential").requests()
    assert request.stop_ids == [120, 3, 7]


@pytest.mark.parametrize("bad", [1.5, True, None, "1", np.float64(2.0), [1], -1, 2**31])
def test_ids_that_are_no_token_ids_are_refused_and_named(bad):
    good: Any = np.int64(1)
    for call in (
        lambda: CODEC.decode([good, bad]),
        lambda: extract_calls([good, bad], CODEC),
        lambda: path_lengths([good, bad], CODEC),
        lambda: Weaver([good, bad], CODEC, 10),
        lambda: Codec.from_vocab({**VOCAB, "Z": bad}, eos_id=1),
        lambda: Codec.from_vocab(VOCAB, eos_id=bad),
        lambda: Codec.from_vocab(VOCAB, eos_id=1, end_ids=[good, bad]),
    ):
        with pytest.raises(ValueError, match=rf"id \d+ is {re.escape(repr(bad))}: "):
            call()


@pytest.mark.parametrize("bad", [5, None, torch.tensor(3), torch.tensor([1.0]), np.array([True])])
def test_what_is_no_list_of_ids_is_refused(bad):
    with pytest.raises(ValueError, match=r"expected a list of token ids|token ids are integers"):
        CODEC.decode(bad)


def test_arrays_tensors_and_their_scalars_are_lists_of_ids():
    ids = [VOCAB["a"], VOCAB["b"]]
    same: Any
    for same in (np.array(ids), torch.tensor(ids), [*np.array(ids)], [*torch.tensor(ids)]):
        assert CODEC.decode(same) == "ab"


def test_a_tokenizer_that_loses_characters_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([tag for tag in TAGS if tag != "<Thread>"], special_tokens=True)
    greedy = AddedToken("<Thread>", lstrip=True, rstrip=True, special=True)
    tokenizer.add_tokens([greedy], special_tokens=True)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="it must keep every character"):
        Codec.from_tokenizer(tokenizer)


def test_ids_outside_the_vocabulary_decode(codec: Codec):
    assert codec.decode([10**6]) == ""
    assert CODEC.decode([VOCAB["a"], 999]) == "a\ufffd"


def test_a_character_vocabulary_names_what_it_lacks():
    with pytest.raises(ValueError, match="lacks 'Z', character 2 of the text"):
        CODEC.encode("abZ")
    with pytest.raises(ValueError, match="lacks the tags <Parallel>, "):
        Codec.from_vocab({"a": 1}, eos_id=2)


def test_character_vocabulary_round_trip():
    text = "12: ab\n<Thread>\n1:</Thread><eos>"
    assert CODEC.decode(CODEC.encode(text)) == text
    assert CODEC.encode("<Thread>1<eos>") == [VOCAB["<Thread>"], VOCAB["1"], 120]
    assert CODEC.newline_ids == (VOCAB["\n"],)


def test_a_codec_survives_pickling(codec: Codec):
    for original in (codec, CODEC):
        copy = pickle.loads(pickle.dumps(original))
        assert copy.encode("1\n<Thread>\n1:") == original.encode("1\n<Thread>\n1:")
