import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from threadweaver.model.tokenizer import EOS, PAD, WORDS, build_tokenizer
from threadweaver.tasks.multiplication import PLACES, trajectory
from threadweaver.trajectory import TAGS

TOKENIZER = build_tokenizer()
# Any text UTF-8 can hold, with tags, words and their halves thrown in.
pieces = st.one_of(
    st.text(st.characters(exclude_categories=("Cs",)), max_size=8),
    st.sampled_from([*TAGS, *WORDS, EOS, PAD, "<Par", "allel>", "<|reserved-0|>", "Ġ", "Ċ", " "]),
)
texts = st.lists(pieces, max_size=12).map("".join)


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory: pytest.TempPathFactory):
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@given(text=texts)
def test_any_text_round_trips(text: str):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@given(text=texts)
def test_reloaded_folder_is_the_same_tokenizer(reloaded, text: str):
    ids = TOKENIZER.encode(text)
    assert reloaded.encode(text) == ids
    assert reloaded.decode(ids) == text


def test_vocabulary_is_a_multiple_of_64_and_the_same_on_every_count(reloaded):
    for tokenizer in (TOKENIZER, reloaded):
        assert len(tokenizer) == tokenizer.vocab_size == 320
        assert sorted(tokenizer.get_vocab().values()) == list(range(320))
        assert (tokenizer.eos_token, tokenizer.pad_token) == (EOS, PAD)


def test_each_tag_is_one_special_token(reloaded):
    for tag in TAGS:
        assert len(TOKENIZER.encode(tag)) == 1
        assert TOKENIZER.convert_tokens_to_ids(tag) in TOKENIZER.all_special_ids
        assert reloaded.decode(reloaded.encode(f"a{tag}b"), skip_special_tokens=True) == "ab"


@given(digits=st.text("0123456789:\n", max_size=12))
def test_digits_colon_and_newline_are_always_tokens_of_their_own(digits: str):
    assert [TOKENIZER.decode([i]) for i in TOKENIZER.encode(digits)] == list(digits)
    assert not any(set(word) & set("0123456789:\n") for word in WORDS)


@given(before=texts, number=st.integers(1, 50), after=texts)
def test_a_forced_thread_header_has_the_same_tokens_in_any_context(before, number, after):
    header = f"\n<Thread>\n{number}:"
    # A tag or word cut in two by the header cannot close over it: both ends are whole tokens.
    assert TOKENIZER.encode(before + header + after) == (
        TOKENIZER.encode(before) + TOKENIZER.encode(header) + TOKENIZER.encode(after)
    )


def test_no_token_is_added_silently(reloaded):
    for tokenizer in (TOKENIZER, reloaded):
        assert len(tokenizer.encode("12")) == len(tokenizer("12").input_ids) == 2
        assert tokenizer.encode("") == []
        assert tokenizer.encode("12", add_special_tokens=True) == tokenizer.encode("12")


def test_the_words_of_the_task_are_single_tokens():
    text = trajectory((4711, 8629), parallel=True)
    tokens = {str(TOKENIZER.decode([id])) for id in TOKENIZER.encode(text)}
    assert not tokens & set(string.ascii_letters)
    assert all(len(TOKENIZER.encode(f"{place} ")) == 1 for place in PLACES)
