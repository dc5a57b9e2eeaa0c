"""Training as a whole: what a step computes, what a run leaves behind."""

import json
import re

import pytest
import torch
import yaml
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from threadweaver.data import load_examples
from threadweaver.model import (
    WeightCopies,
    build_tokenizer,
    load_model,
    new_model,
    save_model,
    supervised_tokens,
    trie_loss,
)
from threadweaver.train import trainer
from threadweaver.train.__main__ import main
from threadweaver.train.batches import Step, unrolled_tokens
from threadweaver.train.config import config_of, parser_of
from threadweaver.train.sft import SFTTrainer
from threadweaver.train.stages import SFTConfig
from tw_kernels import Trie

from .conftest import ARCH


def trainer_of(run, *options: str) -> SFTTrainer:
    parser = parser_of(SFTConfig)
    config = config_of(SFTConfig, parser.parse_args(run.arguments(*options)[1:]))
    trainer = SFTTrainer.prepare(config, False, Console(quiet=True))
    assert trainer is not None
    return trainer


def test_reading_and_long_steps_say_how_far_they_are(new_run, data_files, capsys, ticking_clock):
    run = new_run()
    run.settings["optimization"] |= {"max_steps": 1, "accumulation": 9, "batch_tokens": 128}
    run.settings["data"]["malformed"] = "drop"
    run.settings["data"]["validation"] = str(data_files[0])
    assert run() == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"reading {data_files[0]}: 5 rows" in lines
    assert any(line.startswith(f"building tries of {data_files[0]}: 5/24 rows, ") for line in lines)
    for title in ("training", "validating"):
        of_title = [line for line in lines if line.startswith(f"{title}, step 1: ")]
        assert " micro-batches, " in of_title[0] and of_title[0].endswith(" s left")
        assert re.search(r": (\d+)/\1 micro-batches, in \d+ s$", of_title[-1])


def test_a_run_learns_and_leaves_everything_behind(new_run, data_files, capsys):
    run = new_run()
    run.settings["optimization"]["max_steps"] = 20
    run.settings["evaluate"] = {
        "data": str(data_files[1]),
        "problems": 4,
        "max_new_tokens": 8,
        "batch_size": 3,
    }
    assert run() == 0
    metrics = run.metrics()
    assert [m["step"] for m in metrics] == list(range(1, 21))
    assert metrics[-1]["loss"] < 0.85 * metrics[0]["loss"]
    assert [m["step"] for m in metrics if "validation_loss" in m] == [3, 6, 9, 12, 15, 18, 20]

    summary = run.summary()
    assert summary["train_loss"] == metrics[-1]["loss"]
    assert summary["validation_loss"] == metrics[-1]["validation_loss"]
    assert summary["steps"] == 20
    assert summary["trie_tokens"] == sum(m["trie_tokens"] for m in metrics)
    assert summary["unrolled_tokens"] == sum(m["unrolled_tokens"] for m in metrics)
    assert summary["tokens_per_second"] > 0 and summary["seconds"] > 0
    assert summary["dropped_calls"] == 0
    assert 0 <= summary["accuracy"] <= 1 and 0 <= summary["format"] <= 1

    folder = run.folder
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-18", "step-20"]
    assert summary["checkpoint"] == str(folder / "checkpoints/step-20")
    assert yaml.safe_load((folder / "config.yaml").read_text())["optimization"]["max_steps"] == 20
    events = EventAccumulator(str(folder)).Reload().Scalars("loss")
    assert [e.step for e in events] == list(range(1, 21))
    assert events[-1].value == pytest.approx(metrics[-1]["loss"])
    shown = capsys.readouterr().out
    for part in (
        "train loss",
        "validation loss",
        "accuracy",
        "format",
        "tokens per second",
    ):
        assert part in shown
    assert "20/20" in shown and "step-20" in shown


def test_no_pass_has_arguments_that_fsdp_would_move_to_a_gpu(new_run, gpus_of_fsdp):
    assert new_run()() == 0


def test_moments_are_made_where_nothing_else_was(new_run, monkeypatch):
    """On a GPU in memory of their own, so that rollouts can have what activations took. Later steps
    go on in the memory that PyTorch keeps."""
    calls = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("give back"))

    def watched(optimizer, *arguments):
        calls.append("step")
        return step(optimizer, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    assert new_run()() == 0
    assert calls == ["give back", "give back", *["step"] * 6]


def test_matrices_of_compiled_layers_have_no_copies(new_run, monkeypatch):
    """Which would lie there unread: torch.compile casts the weights of its layers itself."""
    layers = []

    def watched(model, dtype, compiled):
        layers.extend(compiled)
        return WeightCopies(model, dtype, compiled)

    monkeypatch.setattr(trainer, "WeightCopies", watched)
    monkeypatch.setattr(trainer, "compile_layers", lambda model: None)
    assert new_run()() == 0 and not layers
    assert new_run("compiled")("--compute.compile", "true") == 0
    assert len(layers) == ARCH["num_hidden_layers"]


def test_the_same_settings_give_the_same_run_bit_for_bit(new_run):
    a, b = new_run("a"), new_run("b")
    assert a() == b() == 0
    assert a.metrics() == b.metrics()
    assert a.weights() == b.weights()


def test_two_threads_give_the_same_run_bit_for_bit(new_run):
    a, b = new_run("a"), new_run("b")
    for run in (a, b):
        run.settings["optimization"].update(batch_tokens=4096, accumulation=1)
        run.settings["data"].pop("validation")
        assert run("--compute.threads", "2", "--optimization.max_steps", "1") == 0
    assert a.weights() == b.weights()


def test_accumulated_micro_batches_give_the_gradient_of_the_whole_step(new_run, monkeypatch):
    """Micro-batches of unequal token counts: each token weighs the same."""
    gradients = []
    for micro_batches in ([[0, 1, 2, 3, 4]], [[0], [1, 2, 3], [4]]):
        trainer = trainer_of(new_run(f"run{len(gradients)}"))
        monkeypatch.setattr(trainer.optimizer, "step", lambda: None)
        monkeypatch.setattr(trainer.optimizer, "zero_grad", lambda: None)
        record = trainer.train_on(Step(0, micro_batches, False))
        gradients.append((record["loss"], [p.grad for p in trainer.model.parameters()]))
    (loss, whole), (loss_in_parts, parts) = gradients
    assert loss == pytest.approx(loss_in_parts, rel=1e-6)
    for expected, actual in zip(whole, parts, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-7)


def test_the_loss_of_a_step_is_the_mean_over_its_supervised_tokens(new_run):
    trainer = trainer_of(new_run())
    tries = trainer.data.tries[:3]
    with torch.no_grad():
        total = sum(float(trie_loss(trainer.model, trie)) for trie in tries)
    count = sum(supervised_tokens(trie).numel() for trie in tries)
    record = trainer.train_on(Step(0, [[0, 1], [2]], False))
    assert record["supervised_tokens"] == count
    assert record["loss"] == pytest.approx(total / count, rel=1e-5)
    assert record["trie_tokens"] == sum(map(len, tries))
    assert record["unrolled_tokens"] == sum(map(unrolled_tokens, tries))


def test_the_validation_loss_is_the_mean_over_all_supervised_tokens(new_run):
    trainer = trainer_of(new_run())
    validation = trainer.validation
    assert validation is not None
    with torch.no_grad():
        whole = Trie.pack(validation.tries)
        expected = float(trie_loss(trainer.model, whole)) / supervised_tokens(whole).numel()
    assert trainer._validation_loss(validation) == pytest.approx(expected, rel=1e-5)
    assert all(p.grad is None for p in trainer.model.parameters())


def test_the_gradient_is_clipped_to_its_norm(new_run, monkeypatch):
    trainer = trainer_of(new_run(), "--optimization.gradient_clip", "0.01")
    monkeypatch.setattr(trainer.optimizer, "zero_grad", lambda: None)
    record = trainer.train_on(Step(0, [[0]], False))
    gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients]))
    assert record["gradient_norm"] > 0.01
    assert float(norm) == pytest.approx(0.01, rel=1e-3)


def test_norms_do_not_decay_and_matrices_do(new_run):
    trainer = trainer_of(new_run())
    decayed, spared = trainer.optimizer.param_groups
    assert decayed["weight_decay"] == 1e-4 and spared["weight_decay"] == 0
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in spared["params"]} == {1}
    count = len(decayed["params"]) + len(spared["params"])
    assert count == len(list(trainer.model.parameters()))


def test_gradient_checkpointing_changes_memory_and_not_the_run(new_run):
    plain = new_run("plain")
    assert plain() == 0
    for layers in ("true", "1"):
        recomputed = new_run(layers)
        assert recomputed("--compute.gradient_checkpointing", layers) == 0
        assert recomputed.weights() == plain.weights()


def test_weights_copied_once_a_step_train_as_autocast_does(new_run, monkeypatch):
    """As on a GPU, here for a CPU's autocast."""
    plain, copied = new_run("plain"), new_run("copied")
    assert plain("--compute.precision", "bf16") == 0
    casts = []

    class Copies(WeightCopies):
        def __init__(self, model, dtype, compiled):
            assert dtype is None  # on a CPU
            super().__init__(model, torch.bfloat16, compiled)

        def cast(self):
            casts.append(self._layers[0].cast_weight is None)
            super().cast()

    monkeypatch.setattr("threadweaver.train.trainer.WeightCopies", Copies)
    assert copied("--compute.precision", "bf16") == 0
    # Of 6 steps and 2 validations one each, and none for the validation before a step.
    assert len(casts) == 8 and sum(casts) == 7
    for a, b in zip(plain.metrics(), copied.metrics(), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-2)


def test_bfloat16_autocast_stays_near_float32(new_run):
    a, b = new_run("a"), new_run("b")
    assert a() == 0
    assert b("--compute.precision", "bf16") == 0
    for full, half in zip(a.metrics(), b.metrics(), strict=True):
        assert full["loss"] == pytest.approx(half["loss"], rel=0.02)
    model = AutoModelForCausalLM.from_pretrained(b.summary()["checkpoint"])
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_checkpoint_can_be_trained_further(new_run):
    first, second = new_run("first"), new_run("second")
    assert first() == 0
    second.settings["model"] = {"path": first.summary()["checkpoint"]}
    assert second() == 0
    assert second.metrics()[0]["loss"] < first.metrics()[0]["loss"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")


def test_a_model_without_the_tags_gets_them(new_run, tmp_path):
    plain = byte_tokenizer()
    save_model(new_model(plain, ARCH, seed=0), plain, tmp_path / "plain")
    run = new_run()
    run.settings["model"] = {"path": str(tmp_path / "plain")}
    run.settings["optimization"].update(max_steps=1, batch_tokens=2048)
    assert run() == 0
    trained, tokenizer = load_model(run.summary()["checkpoint"])
    ids = tokenizer.encode("<Thread>")
    assert len(ids) == 1 and len(plain) <= ids[0] < trained.config.vocab_size


# Bad input: exit code 2, one line, where it is and what to do.


def test_a_missing_data_file_is_named(new_run, fails):
    assert "data.train: none.jsonl: no such file" in fails(
        new_run()("--data.train", "none.jsonl"), 2
    )


def test_a_line_that_is_no_json_is_named(new_run, fails, tmp_path, data_files):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(data_files[0].read_text().splitlines()[0] + "\n{oops\n")
    assert f"{bad}:2: not JSON" in fails(new_run()("--data.train", str(bad)), 2)


def rewritten(source, target, change) -> str:
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    target.write_text("".join(json.dumps(change(i, row)) + "\n" for i, row in enumerate(rows)))
    return str(target)


def broken(row: dict) -> dict:
    texts = {name: row[name] for name in ("qwen_text", "response")}
    return row | {
        name: text.replace("</think>", "<Parallel></think>") for name, text in texts.items()
    }


def test_a_trajectory_that_breaks_the_format_is_named_with_the_rule(
    new_run, fails, tmp_path, data_files
):
    bad = rewritten(
        data_files[0], tmp_path / "bad.jsonl", lambda i, row: broken(row) if i == 2 else row
    )
    run = new_run()
    line = fails(run("--data.train", bad), 2)
    assert (
        f"{bad}:3: the response breaks the format: " in line and "<think> is never closed" in line
    )
    assert not run.folder.exists()
    assert run("--data.train", bad, "--data.malformed", "drop") == 0
    assert run.summary()["dropped_trajectories"] == 1


@pytest.mark.parametrize("field", ["train", "validation"])
def test_a_file_without_a_well_formed_trajectory_is_refused(
    new_run, fails, tmp_path, data_files, field
):
    bad = rewritten(data_files[1], tmp_path / "bad.jsonl", lambda i, row: broken(row))
    run = new_run()
    line = fails(run(f"--data.{field}", bad, "--data.malformed", "drop"), 2)
    assert f"data.{field}: {bad} holds no well-formed trajectory" in line
    assert not run.folder.exists()


def test_a_trie_over_the_budget_is_named(new_run, fails, data_files):
    line = fails(new_run()("--optimization.batch_tokens", "24"), 2)
    assert f"{data_files[0]}:" in line and "over the budget of 24" in line


def test_cut_calls_are_counted_and_shown(new_run, capsys):
    run = new_run()
    run.settings["optimization"]["max_steps"] = 1
    sizes = sorted(trainer_of(new_run("other")).data.sizes)
    assert run("--optimization.batch_tokens", str(sizes[-1] - 1)) == 0
    assert run.summary()["dropped_calls"] >= 1
    assert f"{run.summary()['dropped_calls']} calls cut" in capsys.readouterr().out


def test_a_head_dim_that_no_backend_takes_is_refused_before_training(new_run, fails, monkeypatch):
    monkeypatch.setenv("TW_BACKEND", "triton")
    run = new_run()
    run.settings["model"]["arch"] = {**run.settings["model"]["arch"], "head_dim": 24}
    line = fails(run(), 2)
    assert "model.arch: " in line and "triton" in line and "head dim 24" in line
    assert not run.folder.exists()


def test_an_unknown_field_of_the_architecture_is_named(new_run, fails):
    run = new_run()
    run.settings["model"]["arch"] = {"model_type": "qwen33"}
    line = fails(run(), 2)
    assert "model.arch" in line and "qwen33" in line


def test_a_missing_model_folder_is_named(new_run, fails):
    run = new_run()
    run.settings["model"] = {"path": "no/such/model"}
    assert "no/such/model" in fails(run(), 2)


def test_a_run_says_how_large_its_model_is(new_run, capsys):
    run = new_run()
    run.settings["optimization"]["max_steps"] = 1
    assert run() == 0
    assert "model: 28.9 K parameters" in capsys.readouterr().out


def test_weights_of_another_shape_than_their_config_are_refused(new_run, fails):
    first, second = new_run("first"), new_run("second")
    assert first() == 0
    checkpoint = first.folder / "checkpoints/step-6"
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    second.settings["model"] = {"path": str(checkpoint)}
    line = fails(second(), 2)
    assert str(checkpoint) in line and "down_proj" in line


def test_a_problem_without_a_ground_truth_is_named_before_training(
    new_run, fails, tmp_path, data_files
):
    def strip_second(i, row):
        return row if i != 1 else {k: v for k, v in row.items() if k != "reward_model"}

    bad = rewritten(data_files[1], tmp_path / "bad.jsonl", strip_second)
    run = new_run()
    assert f"{bad}:2: " in fails(run("--evaluate.data", bad), 2)
    assert not run.folder.exists()


def test_cuda_without_a_gpu_is_refused(new_run, fails, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "compute.device" in fails(new_run()("--compute.device", "cuda"), 2)


def test_a_subcommand_that_does_not_exist_is_refused(fails):
    assert "sft" in fails(main(["sfft"]), 2)


def nan_model(folder) -> str:
    tokenizer = build_tokenizer()
    model = new_model(tokenizer, ARCH, seed=0)
    with torch.no_grad():
        next(model.parameters())[tokenizer.encode("7")] = torch.nan
    save_model(model, tokenizer, folder)
    return str(folder)


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_its_batch(
    new_run, fails, tmp_path, data_files
):
    run = new_run()
    run.settings["model"] = {"path": nan_model(tmp_path / "model")}
    line = fails(run(), 1)
    folder = run.folder / "nan-step-1"
    assert "step-1: loss nan" in line and str(folder) in line
    assert run.metrics() == []
    assert not (run.folder / "summary.json").exists()
    assert not (run.folder / "checkpoints").exists()

    batch = json.loads((folder / "batch.json").read_text())
    sources = {example.source for example in load_examples(data_files[0])}
    assert {s for m in batch["micro_batches"] for s in m["examples"]} <= sources
    assert "nan" in [m["loss"] for m in batch["micro_batches"]]
    # The saved weights and tries give the losses again.
    model, _ = load_model(folder / "model")
    tries = torch.load(folder / "tries.pt")
    for micro, fields in zip(batch["micro_batches"], tries, strict=True):
        again = float(trie_loss(model, Trie(**fields)).detach())
        assert (micro["loss"] == "nan") == (again != again)


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_step(new_run, fails):
    run = new_run()
    line = fails(run("--optimization.learning_rate", "1e30"), 1)
    [folder] = run.folder.glob("nan-step-*")
    step = int(folder.name.removeprefix("nan-step-"))
    assert step >= 2 and f"step-{step}: " in line
    assert [m["step"] for m in run.metrics()] == list(range(1, step))
    model, _ = load_model(folder / "model")
    assert all(p.isfinite().all() for p in model.parameters())
