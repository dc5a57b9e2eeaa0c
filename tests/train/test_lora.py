"""Runs that train adapters: what is trained, what checkpoints are, and how they go on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.trajectory.byte_tokenizer import byte_tokenizer
from threadweaver.model import load_model, save_model
from threadweaver.train.rl import RLTrainer
from threadweaver.train.run_dir import checkpoint_of
from threadweaver.train.sft import SFTTrainer

from .conftest import ARCH, Run
from .test_rl import LetterTask, begins_low

pytest.importorskip("peft")
LORA = {"rank": 4, "alpha": 8}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 512,
}


def write_model(folder: Path, kind: str = "qwen3", tied: bool = True, rows: int = 300) -> str:
    """A model whose tokenizer of 300 tokens lacks the tags."""
    torch.manual_seed(0)
    settings = {**SIZES, "vocab_size": rows, "tie_word_embeddings": tied}
    settings |= {"bos_token_id": None, "eos_token_id": byte_tokenizer().eos_token_id}
    if kind == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**settings))
    else:
        model = LlamaForCausalLM(LlamaConfig(**settings))
    save_model(model, byte_tokenizer(), folder)
    return str(folder)


@pytest.fixture
def lora_run(new_run):
    """Makes a Run of SFT that trains adapters."""

    def make(name: str = "run", **model) -> Run:
        run = new_run(name)
        run.settings["model"] = {**(model or run.settings["model"]), "lora": dict(LORA)}
        return run

    return make


def adapters(run: Run) -> bytes:
    """Of the finished run."""
    folder = run.folder / "checkpoints" / "step-6"
    return (folder / "adapter_model.safetensors").read_bytes()


def test_only_adapters_are_trained_and_the_base_stays_bit_for_bit(lora_run, monkeypatch):
    run, models = lora_run(), []
    finish = SFTTrainer.finish
    monkeypatch.setattr(
        SFTTrainer, "finish", lambda self: (models.append(self.model), finish(self))
    )
    assert run() == 0
    start, _ = load_model(run.folder / "base")
    start = dict(start.named_parameters())
    trained = 0
    for name, parameter in models[0].named_parameters():
        if parameter.requires_grad:
            trained += 1
            assert "lora_" in name or name.endswith("trained_rows")
        else:
            assert torch.equal(parameter, start.pop(name.replace(".base_layer", "")))
    assert not start and trained == 2 * 14 + 1
    losses = [record["loss"] for record in run.metrics()]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind, tied", [("qwen3", True), ("llama", False)])
def test_a_checkpoint_is_what_peft_writes_and_its_export_a_plain_model(
    lora_run, tmp_path, kind, tied
):
    from peft import AutoPeftModelForCausalLM

    run = lora_run(path=write_model(tmp_path / "model", kind, tied))
    assert run() == 0
    step = run.folder / "checkpoints" / "step-6"
    assert {p.name for p in step.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "merged",
        "tokenizer.json",
        "tokenizer_config.json",
        "trainer_state.pt",
    }
    assert not (run.folder / "checkpoints" / "step-4" / "merged").exists()  # export: end
    assert run.summary()["checkpoint"] == str(step / "merged") == str(checkpoint_of(run.folder))
    ids = torch.arange(300)[None]
    with torch.no_grad():
        by_peft = AutoPeftModelForCausalLM.from_pretrained(str(step)).eval()(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(step / "merged").eval()(ids).logits
    torch.testing.assert_close(by_peft, merged, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows, named", [(300, "base"), (320, "model")])
def test_adapters_name_the_model_at_model_path_unless_the_tags_made_it_larger(
    lora_run, tmp_path, rows, named
):
    run = lora_run(path=write_model(tmp_path / "model", rows=rows))
    assert run() == 0
    folder = run.folder / "base" if named == "base" else tmp_path / "model"
    config = json.loads((run.folder / "checkpoints/step-6/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder)
    assert (run.folder / "base").exists() == (named == "base")
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model = PeftModel.from_pretrained(base, str(run.folder / "checkpoints/step-6"))
        merged = AutoModelForCausalLM.from_pretrained(checkpoint_of(run.folder)).eval()
        ids = torch.arange(312)[None]
        logits = [m.eval()(ids).logits[..., :312] for m in (model, merged)]
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


def test_every_checkpoint_has_an_export_if_asked_for(lora_run):
    run = lora_run()
    run.settings["report"] |= {"export": "every", "keep_checkpoints": 3}
    assert run() == 0
    for step in (2, 4, 6):
        load_model(run.folder / "checkpoints" / f"step-{step}" / "merged")


def test_export_changes_nothing_where_the_checkpoint_is_the_plain_folder(new_run):
    run = new_run()
    run.settings["report"]["export"] = "every"
    assert run() == 0
    assert {p.name for p in (run.folder / "checkpoints/step-6").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "trainer_state.pt",
    }


@pytest.mark.parametrize("command", ["sft", "rl"])
def test_an_interrupted_run_goes_on_bit_for_bit(lora_run, new_rl_run, monkeypatch, command):
    make, kind = (lora_run, SFTTrainer) if command == "sft" else (new_rl_run, RLTrainer)
    whole, dead = make("whole"), make("dead")
    assert whole() == 0
    step, calls = kind.train_step, []

    def die_in_its_fourth(self):
        calls.append(self)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "train_step", die_in_its_fourth)
        assert dead() == 130
    assert dead("--resume") == 0
    assert dead.metrics() == whole.metrics()
    assert adapters(dead) == adapters(whole) and dead.weights() == whole.weights()


@pytest.fixture
def new_rl_run(tmp_path, monkeypatch):
    """Makes a Run of P-GRPO that trains adapters."""
    monkeypatch.setattr("threadweaver.train.rl.load_task", lambda *_, **__: LetterTask(begins_low))

    def make(name: str = "run", **settings) -> Run:
        run = Run(
            "rl",
            tmp_path / name,
            rollouts={
                "problems": 3,
                "samples": 4,
                "generation": {"max_tokens": 6},
                "engine": {"kv_gigabytes": 0.01},
            },
            optimization={"steps": 6, "batch_tokens": 256, "learning_rate": 3e-2},
            report={"checkpoint_every": 2},
        )
        run.settings["model"] = {"arch": ARCH, "lora": dict(LORA)}
        run.settings |= settings
        return run

    return make


@pytest.mark.parametrize("kind, tied", [("qwen3", True), ("llama", False)])
def test_rollouts_on_merged_weights_have_the_log_probabilities_of_the_trainer(
    new_rl_run, tmp_path, kind, tied
):
    """The bounds of full training (test_rl.py)."""
    run = new_rl_run(model={"path": write_model(tmp_path / "model", kind, tied), "lora": LORA})
    assert run() == 0
    for record in run.metrics():
        assert record["max_mismatch"] <= 1e-4 and record["mismatch"] <= 1e-5
    assert any(record["gradient_norm"] > 0 for record in run.metrics())


def test_rollouts_are_on_merged_weights_and_share_what_has_no_adapter(new_rl_run, monkeypatch):
    run, seen = new_rl_run(), []
    run.settings["compute"] |= {"precision": "bf16", "parameters": "bf16"}
    run.settings["optimization"]["steps"] = 2
    run.settings["model"]["lora"]["targets"] = ["v_proj"]
    sample = RLTrainer._sample

    def watch(self):
        groups = sample(self)
        own = {p.data_ptr(): name for name, p in self.model.named_parameters()}
        runs = self.engine._runner._weights.model.named_parameters()
        seen.append({name for name, p in runs if p.data_ptr() not in own})
        assert {p.dtype for p in self.lora.adapters.parameters()} == {torch.float32}
        return groups

    monkeypatch.setattr(RLTrainer, "_sample", watch)
    assert run() == 0
    copied = {f"model.layers.{i}.self_attn.v_proj.weight" for i in range(2)}
    # The output layer's rows of tags are in its dtype, those of the embedding in float32.
    assert seen == [copied | {"lm_head.trained_rows"}] * 2
    for record in run.metrics():
        assert record["mismatch"] <= 2e-2  # of bfloat16


def test_the_reference_of_kl_is_the_model_without_adapters(new_rl_run, monkeypatch):
    run, loaded = new_rl_run(), []
    run.settings["policy"] = {"kl": 0.1}
    monkeypatch.setattr("threadweaver.train.rl.build_model", loaded.append)
    assert run() == 0
    assert not loaded  # no second one is in memory
    records = run.metrics()
    assert records[0]["kl"] == 0 and records[-1]["kl"] > 1e-4
