"""The evaluation that a run of SFT ends with: both modes, on the engine."""

import json
import re
import shutil
import weakref

import pytest
import torch

from tests.products import FACTORS, PROMPTS, RESPONSES, save_product_model
from tests.train.on_ranks import on_ranks
from threadweaver.model import load_model
from threadweaver.train.optimizer import build_optimizer


@pytest.fixture
def evaluated_run(new_run, tmp_path):
    """Trains a model that knows two products on the very same, and not for long."""
    data = tmp_path / "products.jsonl"
    rows = [
        {"question": p, "response": r, "reward_model": {"ground_truth": str(a * b)}}
        for p, r, (a, b) in zip(PROMPTS, RESPONSES, FACTORS, strict=True)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = new_run()
    run.settings["model"] = {"path": save_product_model(tmp_path / "model")}
    run.settings["data"] = {"train": str(data)}
    run.settings["optimization"].update(max_steps=1, batch_tokens=2048, learning_rate=1e-6)
    run.settings["evaluate"] = {"data": str(data), "max_new_tokens": 300, "kv_gigabytes": 0.01}
    return run


def test_both_modes_are_evaluated_and_compared(evaluated_run, capsys):
    assert evaluated_run() == 0
    summary = evaluated_run.summary()
    for name in ("accuracy", "format"):
        assert summary[name] == summary[f"parallel_{name}"] == 1
    assert summary["parallel_activation"] == 1
    assert 1.2 < summary["speedup"] < 2
    assert summary["wall_clock_speedup"] > 0
    shown = capsys.readouterr().out
    for part in ("accuracy in threads", "speed-up by threads"):
        assert part in shown


def test_the_evaluation_decodes_in_the_precision_of_the_run_when_moments_are_gone(
    evaluated_run, monkeypatch
):
    """As a pipeline evaluates its stages."""
    optimizers, dtypes = weakref.WeakSet(), []

    def build(*arguments):
        optimizers.add(optimizer := build_optimizer(*arguments))
        return optimizer

    def load(path, dtype):
        assert not optimizers
        dtypes.append(dtype)
        return load_model(path, dtype)

    monkeypatch.setattr("threadweaver.train.trainer.build_optimizer", build)
    monkeypatch.setattr("threadweaver.generate.load.load_model", load)
    evaluated_run.settings["evaluate"]["max_new_tokens"] = 8
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        run_dir = str(evaluated_run.folder / precision)
        assert evaluated_run("--compute.precision", precision, "--run_dir", run_dir) == 0
        assert dtypes.pop() == dtype and not dtypes


def test_how_far_each_mode_is(evaluated_run, capsys, ticking_clock):
    evaluated_run.settings["evaluate"]["max_new_tokens"] = 20
    assert evaluated_run() == 0
    shown = capsys.readouterr().out
    for mode in ("sequential", "parallel"):
        assert re.search(rf"^evaluating, {mode} mode: [01]/2 responses, .* tokens/s$", shown, re.M)


def test_wrong_and_malformed_answers_count(evaluated_run, tmp_path):
    evaluated_run.settings["evaluate"]["max_new_tokens"] = 20
    assert evaluated_run() == 0
    summary = evaluated_run.summary()
    assert summary["accuracy"] == summary["parallel_accuracy"] == 0
    assert summary["format"] == 0


def test_prompts_without_responses_can_be_evaluated_on(evaluated_run, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"question": PROMPTS[0], "ground_truth": "602"}) + "\n")
    evaluated_run.settings["evaluate"]["data"] = str(path)
    assert evaluated_run() == 0
    assert evaluated_run.summary()["accuracy"] == 1


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("kv_gigabytes", "0.00005", "kv_gigabytes"),
        ("max_new_tokens", "0", "evaluate.max_new_tokens is 0: it must be at least 1"),
    ],
)
def test_what_the_engine_would_refuse_is_refused_before_training(
    evaluated_run, fails, option, value, message
):
    assert message in fails(evaluated_run(f"--evaluate.{option}", value), 2)
    assert not evaluated_run.folder.exists()


def test_a_prompt_longer_than_the_context_is_named_before_training(evaluated_run, fails, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"question": "1" * 1024, "ground_truth": "1"}) + "\n")
    line = fails(evaluated_run("--evaluate.data", str(path)), 2)
    assert line.startswith("error: evaluate: none of 1 prompts leaves room for a response: ")
    assert f"{path}:1: the prompt has 1024 tokens" in line
    assert not evaluated_run.folder.exists()


def test_prompts_longer_than_the_context_are_skipped_and_counted(evaluated_run, tmp_path, capsys):
    path = tmp_path / "long.jsonl"
    rows = [{"question": q, "ground_truth": "1"} for q in ("1" * 1024, PROMPTS[0])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluated_run("--evaluate.data", str(path), "--evaluate.max_new_tokens", "8") == 0
    assert f"evaluate: 1 of 2 prompts are skipped: {path}:1: " in capsys.readouterr().out
    assert evaluated_run.summary()["skipped_prompts"] == 1


def test_evaluation_grades_as_its_task_does(evaluated_run, tmp_path, fails):
    """Not as products, nor as mathematics: by the options of the file, or by a task of any kind."""
    path = tmp_path / "halves.jsonl"
    path.write_text(json.dumps({"question": PROMPTS[0], "ground_truth": "1204/2"}) + "\n")
    evaluated_run.settings["evaluate"]["data"] = str(path)
    assert evaluated_run() == 0 and evaluated_run.summary()["accuracy"] == 1
    shutil.rmtree(evaluated_run.folder)
    evaluated_run.settings["evaluate"]["options"] = {"whole_numbers": True}
    assert "'1204/2' is no whole number" in fails(evaluated_run(), 2)


def test_evaluation_takes_the_held_out_problems_of_a_task(evaluated_run, fails):
    evaluated_run.settings["evaluate"] |= {"data": "multiplication", "problems": 3}
    evaluated_run.settings["evaluate"] |= {"options": {"digits": 1, "validation": 4}}
    evaluated_run.settings["evaluate"]["max_new_tokens"] = 20
    assert evaluated_run() == 0
    assert evaluated_run.summary()["accuracy"] == 0
    shutil.rmtree(evaluated_run.folder)
    line = fails(evaluated_run("--evaluate.problems", "9"), 2)
    assert "evaluate.data: multiplication has 4 validation problems, not 9" in line


@pytest.mark.slow
def test_ranks_evaluate_together_and_find_what_one_process_finds(evaluated_run, tmp_path):
    assert evaluated_run("--optimization.accumulation", "2") == 0
    alone = evaluated_run.summary()
    evaluated_run.folder.rename(tmp_path / "alone")
    arguments = evaluated_run.arguments("--optimization.accumulation", "2")
    ended = on_ranks(arguments, tmp_path, 2)
    assert ended.codes == [0, 0], ended.err
    together = evaluated_run.summary()
    assert alone["accuracy"] == 1
    for name in ("accuracy", "format", "parallel_accuracy", "parallel_activation", "speedup"):
        assert together[name] == alone[name]
