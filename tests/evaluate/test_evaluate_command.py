"""`python -m threadweaver.eval`: what it shows, saves and refuses."""

from __future__ import annotations

import json
import os
import re
import sys

import pytest
import torch

from tests.evaluate.conftest import GREEDY
from tests.products import ARCH, CODEC, FACTORS, PROMPTS, RESPONSES
from tests.trajectory.byte_tokenizer import byte_tokenizer
from threadweaver.eval import main
from threadweaver.model import load_model, new_model, save_model


@pytest.fixture
def solve(folder):
    """Runs the command with greedy choices; options given later win."""

    def run(*options: str, model: str = folder, task: str = "multiplication") -> int:
        return main(["--model", model, "--task", task, *GREEDY.split(), "--n", "2", *options])

    return run


@pytest.fixture
def known(tmp_path) -> list[str]:
    """Options for the task of the two products that the model knows."""
    pytest.importorskip("math_verify")
    path = tmp_path / "products.jsonl"
    rows = [
        {"question": prompt, "reward_model": {"ground_truth": str(a * b)}}
        for prompt, (a, b) in zip(PROMPTS, FACTORS, strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--task", str(path), "--task_options", "{held_out: 1}"]


@pytest.fixture
def refused(solve, stopped_clock, capsys):
    """Checks that the command ends with a code and one line on stderr; returns the line."""

    def run(*options: str, code: int = 2, **others: str) -> str:
        assert solve(*options, **others) == code
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1, error
        return error

    return run


def test_both_modes_side_by_side_and_what_threads_gain(solve, known, capsys, tmp_path):
    figures, responses = tmp_path / "e.json", tmp_path / "r.jsonl"
    options = ["--mode", "both", "--json", str(figures), "--responses", str(responses)]
    assert solve(*known, *options) == 0
    shown = capsys.readouterr().out
    for part in ("sequential", "parallel", "accuracy", "100.0% [34.2, 100.0]", "max speedup"):
        assert part in shown
    assert "parallel over sequential: 1." in shown and "accuracy +0.0 points" in shown

    record = json.loads(figures.read_text())
    total, longest = (
        record[mode][f"{name}_tokens"]["value"]
        for mode, name in (("sequential", "total"), ("parallel", "longest_path"))
    )
    assert record["comparison"]["speedup"]["value"] == pytest.approx(total / longest)
    assert record["comparison"]["wall_clock_speedup"] == pytest.approx(
        record["sequential"]["seconds"] / record["parallel"]["seconds"]
    )
    rows = [json.loads(line) for line in responses.read_text().splitlines()]
    assert [row["mode"] for row in rows] == ["sequential"] * 2 + ["parallel"] * 2
    for row in rows:
        assert row["response"] == RESPONSES[PROMPTS.index(row["prompt"])]
        assert row["correct"] and row["violations"] == [] and row["blocks"] == 1


def test_how_far_it_is_goes_to_stderr_and_stdout_has_the_table_alone(
    solve, known, capsys, ticking_clock
):
    assert solve(*known, "--samples", "2", "--mode", "both") == 0
    out, err = capsys.readouterr()
    assert "evaluating" not in out and "accuracy" in out
    lines = err.splitlines()
    for mode in ("sequential", "parallel"):
        of_mode = [line for line in lines if line.startswith(f"evaluating, {mode} mode: ")]
        assert re.search(r": [0-4]/4 responses, [\d,]+ tokens/s", of_mode[0])
        assert re.search(r": 4/4 responses, .* tokens/s, 4 graded, in \d+ s$", of_mode[-1])
    assert all(line.startswith("evaluating, ") for line in lines)


def test_quick_work_leaves_stderr_empty(solve, known, stopped_clock, capsys):
    assert solve(*known, "--max_tokens", "5") == 0
    assert capsys.readouterr().err == ""


def test_a_task_by_name_with_several_samples(solve, capsys, tmp_path):
    path = tmp_path / "r.jsonl"
    options = ["--samples", "3", "--temperature", "1", "--max_tokens", "20"]
    options += ["--task_options", "{digits: 1, validation: 9}", "--responses", str(path)]
    assert solve(*options) == 0
    assert "pass@3" in capsys.readouterr().out
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["sample"] for row in rows] == [0, 1, 2] * 2
    assert all(len(row["prompt"]) == len("3*4=?\n") for row in rows)


def test_a_model_without_tags_is_evaluated_in_sequential_mode_only(solve, refused, tmp_path):
    tokenizer, model = byte_tokenizer(), str(tmp_path)
    save_model(new_model(tokenizer, ARCH), tokenizer, model)
    assert solve("--mode", "sequential", "--max_tokens", "5", model=model) == 0
    for mode in ("parallel", "both"):
        line = refused("--mode", mode, model=model)
        assert "python -m threadweaver.add_tags --model MODEL --out FOLDER" in line


def test_it_runs_without_datasets(solve, known, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert solve(*known, "--max_tokens", "5") == 0


def test_ctrl_c_ends_with_its_own_code(refused, monkeypatch):
    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr("threadweaver.generate.engine.Engine.step", interrupt)
    assert "interrupted" in refused(code=130)


# Bad input: exit code 2, one line, what was wrong and what to do.


def test_an_unknown_task_is_refused_with_the_nearest_name(refused):
    line = refused(task="multiplicaton")
    assert "no task 'multiplicaton'" in line and "did you mean 'multiplication'?" in line


def test_an_unknown_option_of_a_task_is_named(refused):
    assert "digit" in refused("--task_options", "{digit: 2}")


def test_a_path_without_a_model_is_named(refused):
    assert "no/such: no model here" in refused(model="no/such")


def test_a_prompt_longer_than_the_context_is_named_with_its_problem(refused, folder, tmp_path):
    pytest.importorskip("math_verify")
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"question": "1" * 1024, "ground_truth": "1"}) + "\n")
    line = refused("--n", "1", "--task_options", "{held_out: 1}", task=str(path))
    assert f"{path}:1: the prompt has 1024 tokens" in line


def test_prompts_that_do_not_fit_are_skipped_and_counted(solve, known, capsys, tmp_path):
    path, figures = tmp_path / "products.jsonl", tmp_path / "e.json"
    with path.open("a") as file:
        file.write(json.dumps({"question": "1" * 1024, "ground_truth": "1"}) + "\n")
    assert solve(*known, "--n", "null", "--json", str(figures)) == 0
    shown = capsys.readouterr().out
    assert f"1 of 3 prompts are skipped: {path}:3: the prompt has 1024 tokens" in shown
    record = json.loads(figures.read_text())
    assert record["skipped_prompts"] == 1 and record["parallel"]["problems"] == 2


@pytest.mark.parametrize("option", ["json", "responses"])
def test_figures_that_cannot_be_written_are_shown_all_the_same(
    solve, known, stopped_clock, capsys, option
):
    assert solve(*known, f"--{option}", "/dev/full") == 1
    shown = capsys.readouterr()
    assert "accuracy" in shown.out
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1
    assert "/dev/full: No space left on device" in shown.err


def test_files_are_written_though_nobody_reads_what_is_shown(
    solve, known, stopped_clock, monkeypatch, capsys, tmp_path
):
    figures = tmp_path / "e.json"
    reader, writer = os.pipe()
    with monkeypatch.context() as patch, os.fdopen(writer, "w") as output:
        patch.setattr(sys, "stdout", output)
        os.close(reader)
        assert solve(*known, "--json", str(figures)) == 141
    assert capsys.readouterr().err == ""
    assert json.loads(figures.read_text())["parallel"]["problems"] == 2


def test_one_file_for_figures_and_responses_is_refused(refused, tmp_path):
    path = str(tmp_path / "a.json")
    assert "name another" in refused("--json", path, "--responses", path)
    folder = str(tmp_path)
    assert f"json: {folder} is a folder; name a file in it" in refused("--json", folder)
    assert "none: no such folder; make it" in refused("--json", f"{folder}/none/a.json")


@pytest.mark.parametrize("option", ["n", "samples", "at_once"])
def test_more_responses_than_there_can_be_are_refused(refused, option):
    assert "at most 1,000,000" in refused(f"--{option}", "1" + 23 * "0")


def test_a_pool_too_small_for_one_sequence_is_refused(refused):
    assert "kv_gigabytes" in refused("--kv_gigabytes", "0.00005")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("n", "0"),
        ("samples", "0"),
        ("temperature", "-1"),
        ("top_p", "0"),
        ("max_tokens", "0"),
        ("kv_gigabytes", "1e9"),
        ("kv_gigabytes", "nan"),
        ("page_size", "1" + 23 * "0"),
    ],
)
def test_a_setting_out_of_range_is_named(refused, option, value):
    assert option in refused(f"--{option}={value}")


@pytest.mark.parametrize("option", ["json", "responses"])
def test_a_file_that_cannot_be_written_is_named_before_anything_is_decoded(
    refused, option, tmp_path
):
    assert f"{option}: " in refused(f"--{option}", str(tmp_path / "none" / "file"))


def test_logits_that_are_not_finite_end_with_the_request_named(refused, folder, tmp_path):
    model, tokenizer = load_model(folder)
    with torch.no_grad():
        next(model.parameters())[CODEC.encode("*")] = torch.nan
    save_model(model, tokenizer, tmp_path)
    assert "request (0,)" in refused(model=str(tmp_path), code=1)
