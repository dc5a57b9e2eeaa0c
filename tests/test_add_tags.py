"""`python -m threadweaver.add_tags`: from a model without the tags to a folder with them."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.products import ARCH
from tests.trajectory.byte_tokenizer import byte_tokenizer
from threadweaver.add_tags import main
from threadweaver.generate import GenerationSettings
from threadweaver.generate.load import load_engine
from threadweaver.generate.options import EngineSettings
from threadweaver.model import load_model, load_tokenizer, new_model, save_model
from threadweaver.trajectory import TAGS


@pytest.fixture(scope="module")
def tagless(tmp_path_factory) -> str:
    path, tokenizer = tmp_path_factory.mktemp("tagless"), byte_tokenizer()
    model = new_model(tokenizer, ARCH)
    torch.nn.Module.to(model, torch.bfloat16)
    save_model(model, tokenizer, path)
    return str(path)


@pytest.fixture
def refused(capsys):
    def check(code: int) -> str:
        error = capsys.readouterr().err
        assert code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
        return error

    return check


def test_the_folder_is_that_of_a_model_with_tags(tagless, tmp_path, capsys):
    out = str(tmp_path / "new" / "model")
    assert main(["--model", tagless, "--out", out]) == 0
    assert out in (shown := capsys.readouterr().out) and ", ".join(TAGS) in shown
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert all(len(tokenizer.encode(tag, add_special_tokens=False)) == 1 for tag in TAGS)
    plain = AutoModelForCausalLM.from_pretrained(out)
    assert plain.dtype == torch.bfloat16  # as it was stored
    assert plain.config.vocab_size % 64 == 0
    old, _ = load_model(tagless)
    before, after = (next(model.parameters()) for model in (old, plain))
    assert torch.equal(after[:300].float(), before[:300])
    engine, _ = load_engine(out, EngineSettings(device="cpu", kv_gigabytes=0.01), parallel=True)
    engine.add(engine.codec.encode("Thread"), GenerationSettings(max_tokens=3))
    assert len(engine.run()) == 1


def test_a_model_that_has_the_tags_is_saved_as_it_is(tagless, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["--model", tagless, "--out", str(first)]) == 0
    capsys.readouterr()
    assert main(["--model", str(first), "--out", str(second)]) == 0
    assert "nothing" in capsys.readouterr().out
    weights = [(folder / "model.safetensors").read_bytes() for folder in (first, second)]
    assert weights[0] == weights[1]


def test_smollm2_ends_its_turns_with_the_token_it_was_trained_on(smollm2):
    assert load_tokenizer(smollm2).eos_token == "<|im_end|>"


def test_a_folder_that_holds_something_is_refused(tagless, tmp_path, refused):
    (tmp_path / "kept").write_text("x")
    assert f"{tmp_path} is not empty" in refused(main(["--model", tagless, "--out", str(tmp_path)]))
    file = str(tmp_path / "kept")
    assert f"{file} is a file" in refused(main(["--model", tagless, "--out", file]))
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_path_without_a_model_is_named(tmp_path, refused):
    out = tmp_path / "out"
    assert "no/such: no model here" in refused(main(["--model", "no/such", "--out", str(out)]))
    assert not out.exists()


def test_both_arguments_are_needed(refused):
    assert "out" in refused(main(["--model", "smollm2"]))
    assert "did you mean 'model'?" in refused(main(["--modl", "smollm2", "--out", "o"]))
