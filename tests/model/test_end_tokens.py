"""Which tokens end a response, by the configs of a model; and how long its context is."""

import json

import pytest

from threadweaver.data import Example
from threadweaver.generate.load import load_engine
from threadweaver.generate.options import EngineSettings
from threadweaver.model import build_tokenizer, context_length, end_ids, new_model, save_model
from threadweaver.train.batches import build_tries
from threadweaver.train.config import DataConfig
from threadweaver.trajectory import Codec

TINY = {
    "model_type": "qwen3",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
RESERVED = "<|reserved-0|>"


@pytest.mark.parametrize(
    ("generation", "config", "ends"),
    [(None, 1, (1,)), (30, 1, (1, 30)), ([31, 1, 30], [1, 32], (1, 30, 31, 32))],
)
def test_the_end_tokens_are_the_union_of_the_tokenizers_and_both_configs(
    tmp_path, generation, config, ends
):
    tokenizer = build_tokenizer()
    save_model(new_model(tokenizer, TINY), tokenizer, tmp_path)
    for name, value in (("generation_config", generation), ("config", config)):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": value}))
    settings = EngineSettings(device="cpu", precision="fp32", kv_gigabytes=0.001)
    engine, _ = load_engine(str(tmp_path), settings, parallel=True)
    assert engine.codec.end_ids == ends


@pytest.mark.parametrize("bad", ["<eos>", 1.0, [1, True], [None]])
def test_an_end_token_that_is_no_id_is_refused_with_the_field_named(bad):
    model = new_model(build_tokenizer(), TINY)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = bad
    with pytest.raises(ValueError, match=r"generation_config\.eos_token_id: id \d is "):
        end_ids(model)


def test_a_response_is_trained_with_one_end_token():
    tokenizer = build_tokenizer()
    other = tokenizer.convert_tokens_to_ids(RESERVED)
    assert isinstance(other, int)
    codec = Codec.from_tokenizer(tokenizer, [other])
    response = "<think>\na\n</think>\n\\boxed{7}"
    for text, last in ((response, codec.eos_id), (response + RESERVED, other)):
        rows = [Example("1?\n", text, None, "rows.jsonl:1")]
        (trie,) = build_tries(rows, codec, DataConfig(train=""), 4096).tries
        ends = [id for id in trie.tokens.tolist() if id in codec.end_ids]
        assert ends == [last] and trie.tokens[-1] == last


@pytest.mark.parametrize(
    ("arch", "length"),
    [
        ({**TINY, "max_position_embeddings": 77}, 77),
        ({"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 1, "n_positions": 77}, 77),
    ],
)
def test_the_context_is_that_of_the_config(arch, length):
    assert context_length(new_model(build_tokenizer(), arch)) == length


def test_a_table_of_positions_that_is_smaller_than_the_config_says_ends_the_context():
    arch = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 1, "n_positions": 77}
    model = new_model(build_tokenizer(), arch)
    model.config.n_positions = 100
    assert context_length(model) == 77
    model.config.n_positions = 50
    assert context_length(model) == 50
