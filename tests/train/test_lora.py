"""Runs that train adapters: what is trained, what checkpoints are, and how they go on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.architecture import SMALL
from tests.trajectory.byte_tokenizer import byte_tokenizer
from threadweaver.model import load_model, save_model
from threadweaver.train.__main__ import main
from threadweaver.train.rl import RLTrainer
from threadweaver.train.run_dir import checkpoint_of
from threadweaver.train.sft import SFTTrainer

from .conftest import ARCH, Run
from .easy_task import pipeline_settings, write_task
from .test_rl import LetterTask, begins_low

pytest.importorskip("peft")
LORA = {"rank": 4, "alpha": 8}


def write_model(
    folder: Path,
    kind: str = "qwen3",
    tied: bool = True,
    rows: int = 300,
    initializer_range: float = 0.02,
) -> str:
    """A model whose tokenizer of 300 tokens lacks the tags."""
    torch.manual_seed(0)
    settings = {**SMALL, "model_type": kind, "max_position_embeddings": 512, "vocab_size": rows}
    settings |= {"tie_word_embeddings": tied, "initializer_range": initializer_range}
    settings |= {"bos_token_id": None, "eos_token_id": byte_tokenizer().eos_token_id}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
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


@pytest.mark.parametrize(
    "kind, tied, rows, base", [("qwen3", True, 300, "run/base"), ("llama", False, 320, "model")]
)
def test_a_checkpoint_is_what_peft_writes_and_its_export_a_plain_model(
    lora_run, tmp_path, kind, tied, rows, base
):
    """The adapters name the model at model.path, unless the tags made that larger."""
    from peft import AutoPeftModelForCausalLM, PeftModel

    run = lora_run(path=write_model(tmp_path / "model", kind, tied, rows))
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
    config = json.loads((step / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / base)
    assert (run.folder / "base").exists() == (base == "run/base")
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / base)
    models = [
        AutoModelForCausalLM.from_pretrained(step / "merged"),
        AutoPeftModelForCausalLM.from_pretrained(str(step)),
        PeftModel.from_pretrained(stored, str(step)),
    ]
    with torch.no_grad():
        ids = torch.arange(312)[None]  # all that there is a token for
        logits = [model.eval()(ids).logits[..., :312] for model in models]
    for others in logits[1:]:
        torch.testing.assert_close(others, logits[0], rtol=1e-5, atol=1e-5)


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


@pytest.mark.parametrize("command", ["sft", pytest.param("rl", marks=pytest.mark.slow)])
def test_an_interrupted_run_goes_on_bit_for_bit(lora_run, new_rl_run, monkeypatch, command):
    make, kind = (lora_run, SFTTrainer) if command == "sft" else (new_rl_run, RLTrainer)
    whole, dead = make("whole"), make("dead")
    assert whole() == 0
    dead.dies_in_step(4, kind, monkeypatch)
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
    monkeypatch.setattr("threadweaver.train.policy_update.build_passes", loaded.append)
    assert run() == 0
    assert not loaded  # no second one is in memory
    records = run.metrics()
    assert records[0]["kl"] == 0 and records[-1]["kl"] > 1e-4


def test_a_model_without_tags_learns(lora_run, tmp_path):
    """New tags of a word begin with one row for all of them: with that row kept the loss stays at
    1.6, since adapters cannot tell <Thread> from </Thread>."""
    run = lora_run(path=write_model(tmp_path / "model", initializer_range=0.2))
    run.settings["model"]["lora"] = {"rank": 8, "alpha": 16}
    run.settings["data"] = {"train": str(write_task(tmp_path / "seven.jsonl", 20))}
    run.settings["optimization"] = {
        "max_steps": 60,
        "batch_tokens": 2048,
        "learning_rate": 1.5e-2,
        "weight_decay": 0.0,
    }
    run.settings["report"] = {"checkpoint_every": 60}
    assert run() == 0
    assert run.summary()["train_loss"] < 1.1


@pytest.mark.parametrize(
    "lora, message",
    [
        ({"rank": 0}, "model.lora.rank is 0: it must be at least 1"),
        ({"alpha": 0}, "model.lora.alpha is 0.0: it must be above 0 and finite"),
        ({"targets": []}, "model.lora.targets is empty: name linear layers, or leave it out"),
        ({"targets": ["nothing"]}, "model.lora.targets: 'nothing' names no linear layer"),
        ({"ranks": 4}, "unknown setting 'model.lora.ranks': see --model.lora.help"),
        ({"rank": "much"}, "model.lora.rank: Expected a <class 'int'>. Got value: much"),
        (True, "model.lora is True: it must be a section of settings"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_line(new_run, fails, lora, message):
    run = new_run()
    run.settings["model"]["lora"] = lora
    assert message in fails(run(), 2)
    assert not run.folder.exists()


def test_the_command_line_sets_one_field(new_run):
    run = new_run()
    assert run("--model.lora.rank", "2", "--optimization.max_steps", "1") == 0
    saved = yaml.safe_load((run.folder / "config.yaml").read_text())["model"]["lora"]
    assert saved == {"rank": 2, "alpha": 32.0, "targets": "all-linear"}


def test_without_peft_the_extra_is_named_before_anything_is_loaded(lora_run, fails, monkeypatch):
    run = lora_run(path="nowhere")
    monkeypatch.setattr("threadweaver.model.lora.importlib.util.find_spec", lambda name: None)
    assert "model.lora: it needs the package 'peft': pip install 'threadweaver[lora]'" in fails(
        run(), 2
    )


def test_a_run_goes_on_with_the_adapters_that_it_has_or_not_at_all(
    lora_run, new_run, fails, capsys
):
    with_lora, without = lora_run("with"), new_run("without")
    for run in (with_lora, without):
        assert run("--optimization.max_steps", "2") == 0
        (run.folder / "summary.json").unlink()
    capsys.readouterr()

    def resumed(run: Run, **lora) -> str:
        run.settings["model"]["lora"] = lora or None
        return fails(run("--optimization.max_steps", "2", "--resume"), 2)

    assert "model.lora.rank is 8, but" in resumed(with_lora, rank=8, alpha=8)
    assert "model.lora.alpha is None, but" in resumed(with_lora)
    # The defaults of a section are no settings of a run that was made without it.
    assert "model.lora.rank is 16, but" in resumed(without, rank=16, alpha=32.0)


def test_adapters_do_not_go_on_over_another_model(lora_run, tmp_path, fails):
    run = lora_run(path=write_model(tmp_path / "model"))
    assert run("--optimization.max_steps", "2") == 0
    (run.folder / "summary.json").unlink()
    write_model(tmp_path / "model", initializer_range=0.1)
    line = fails(run("--optimization.max_steps", "2", "--resume"), 2)
    assert "is not what the adapters of" in line


def test_a_damaged_adapter_file_is_named_and_what_to_do(lora_run, fails):
    run = lora_run()
    assert run("--optimization.max_steps", "2") == 0
    (run.folder / "summary.json").unlink()
    file = run.folder / "checkpoints/step-2/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    line = fails(run("--optimization.max_steps", "2", "--resume"), 2)
    assert str(file) in line and "delete the folder step-2" in line


@pytest.mark.slow
def test_nothing_but_the_run_is_said(lora_run):
    """peft imports packages that warn of kernels nobody uses here."""
    run = lora_run()
    done = subprocess.run(
        [sys.executable, "-m", "threadweaver.train", *run.arguments("--optimization.max_steps=1")],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    """The folder of a pipeline of adapters."""
    folder = tmp_path_factory.mktemp("pipeline")
    settings = pipeline_settings(folder / "run", write_task(folder / "seven.jsonl"))
    settings["model"] = {
        "path": write_model(folder / "model", initializer_range=0.2),
        "lora": {"rank": 8, "alpha": 16},
    }
    settings["sft"]["optimization"] |= {"learning_rate": 2e-2, "batch_tokens": 2048}
    for stage, temperature in (("self_train", 0.1), ("rl", 0.5)):  # so that some are right
        generation = {"max_tokens": 80, "sampling": {"temperature": temperature}}
        settings[stage]["rollouts"]["generation"] = generation
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    assert main(["pipeline", "--config", str(folder / "run.yaml")]) == 0
    return folder / "run"


@pytest.mark.slow
def test_each_stage_of_a_pipeline_starts_from_the_merged_model_of_the_one_before(pipeline):
    def config(stage: str) -> dict:
        return yaml.safe_load((pipeline / stage / "config.yaml").read_text())["model"]

    ends = {s: str(checkpoint_of(pipeline / s)) for s in ("sft", "self_train/sft", "rl")}
    assert config("self_train")["path"] == ends["sft"]
    assert config("self_train/sft")["path"] == ends["sft"]
    assert config("rl")["path"] == ends["self_train/sft"]
    for stage, end in ends.items():
        assert Path(end).name == "merged"
        adapter = json.loads((Path(end).parent / "adapter_config.json").read_text())
        assert (adapter["r"], adapter["lora_alpha"]) == (8, 16)
        base = adapter["base_model_name_or_path"]
        assert base == (str(pipeline / "sft" / "base") if stage == "sft" else config(stage)["path"])
        merged = load_file(Path(end) / "model.safetensors")
        before = load_file(Path(base) / "model.safetensors")
        q = "model.layers.0.self_attn.q_proj.weight"
        assert merged.keys() == before.keys() and not torch.equal(merged[q], before[q])
    summary = json.loads((pipeline / "summary.json").read_text())
    assert summary["checkpoint"] == ends["rl"]
