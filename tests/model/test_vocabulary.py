"""add_tags on tiny models with random weights."""

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tests.products import ARCH
from tests.trajectory.byte_tokenizer import byte_tokenizer
from tests.trajectory.word_tokenizer import word_tokenizer
from threadweaver.model import add_tags, ids_end, new_model
from threadweaver.trajectory import TAGS, Codec

TINY = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


def tiny(architecture: str, rows: int, tied: bool):
    torch.manual_seed(0)
    settings = {**TINY, "vocab_size": rows, "tie_word_embeddings": tied}
    if architecture == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**settings))
    return LlamaForCausalLM(LlamaConfig(**settings))


def parameters(model) -> list[torch.nn.Parameter]:
    return [model.get_input_embeddings().weight, model.get_output_embeddings().weight]


def tables(model) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in parameters(model)]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_a_new_row_is_the_mean_of_the_rows_of_the_bare_word(architecture, tied):
    tokenizer = byte_tokenizer()
    model = tiny(architecture, len(tokenizer), tied)
    before = tables(model)
    words = {tag: tokenizer.encode(tag.strip("</>")) for tag in TAGS}
    assert add_tags(tokenizer, model) == list(TAGS)
    after = tables(model)
    assert torch.equal(after[0], after[1]) == tied
    embedding, output = parameters(model)
    assert (embedding is output) == tied
    for old, new in zip(before, after, strict=True):
        assert new.shape == (320, 16)  # 300 tokens and 12 tags, up to a multiple of 64
        assert torch.equal(new[: len(old)], old)
        for tag, word in words.items():
            row = new[tokenizer.convert_tokens_to_ids(tag)]
            torch.testing.assert_close(row, old[word].mean(0), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(new[312:], old.mean(0).expand(8, -1), rtol=1e-6, atol=1e-7)
    assert model.config.vocab_size == 320
    assert model(torch.tensor([[1, 311]])).logits.shape == (1, 2, 320)


def test_tags_that_are_there_change_nothing():
    tokenizer = byte_tokenizer()
    model = tiny("qwen3", len(tokenizer), tied=False)
    add_tags(tokenizer, model)
    vocab, before = tokenizer.get_vocab(), tables(model)
    assert add_tags(tokenizer, model) == []
    assert tokenizer.get_vocab() == vocab
    assert all(map(torch.equal, before, tables(model)))


def test_a_tokenizer_that_leaves_ids_out_needs_rows_up_to_its_last():
    tokenizer = word_tokenizer(gap=100)
    assert len(tokenizer) == 264 < ids_end(tokenizer) == tokenizer.encode("late")[0] + 1 == 364
    model = new_model(tokenizer, ARCH)
    assert model.config.vocab_size == 384
    add_tags(tokenizer, model)
    assert model.config.vocab_size == 384


def test_spare_rows_are_used_and_tables_never_shrink():
    tokenizer = byte_tokenizer()
    model = tiny("qwen3", 384, tied=True)
    before = tables(model)[0]
    add_tags(tokenizer, model)
    after = tables(model)[0]
    assert after.shape == before.shape
    assert torch.equal(after[:300], before[:300])
    assert torch.equal(after[312:], before[312:])
    word = tokenizer.encode("think")
    torch.testing.assert_close(
        after[tokenizer.convert_tokens_to_ids("<think>")], before[word].mean(0)
    )


def test_think_tags_of_the_tokenizer_keep_their_rows():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    model = tiny("llama", len(tokenizer), tied=False)
    before = tables(model)
    assert add_tags(tokenizer, model) == [tag for tag in TAGS if "think" not in tag]
    for old, new in zip(before, tables(model), strict=True):
        assert torch.equal(new[:302], old)


def test_a_model_catches_up_with_a_tokenizer_that_came_with_the_tags():
    tokenizer = byte_tokenizer()
    model, other = tiny("qwen3", 300, tied=False), tiny("qwen3", 300, tied=False)
    add_tags(tokenizer, model)
    assert add_tags(tokenizer, other) == []
    assert all(map(torch.equal, tables(model), tables(other)))


def test_tags_survive_saving(tmp_path):
    tokenizer = byte_tokenizer()
    add_tags(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    codec, copy = Codec.from_tokenizer(tokenizer), Codec.from_tokenizer(loaded)
    assert copy.tag_ids == codec.tag_ids
    assert copy.encode("a<think>\n</Thread>") == codec.encode("a<think>\n</Thread>")
