"""What self-training keeps, and that it says why when it keeps nothing."""

from __future__ import annotations

import json
import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from threadweaver.data import load_examples, save_rows
from threadweaver.train import self_train
from threadweaver.train.self_train import SelfTraining, select
from threadweaver.train.sft import SFTTrainer
from threadweaver.trajectory import Rendered

from .conftest import ARCH, Run
from .easy_task import PARALLEL, write_task


def row(question: str, response: str, correct: bool = True, *violations: str) -> dict:
    return {
        "question": question,
        "ground_truth": "7",
        "response": response,
        "correct": correct,
        "violations": list(violations),
    }


def test_only_right_and_well_formed_rollouts_are_kept_once_and_up_to_the_cap():
    rows = [
        row("a?", "x"),
        row("a?", "x"),
        row("a?", "y", False),
        row("a?", "z", True, "line 3: <think> is never closed"),
        row("a?", "w", False, "line 12: <think> is never closed"),
        row("a?", "v"),
        row("a?", "u"),
        row("b?", "x"),
        {**row("b?", "y"), "fits": False},
    ]
    kept, report = select(rows, 2, "response", 512)
    assert [(k["question"], k["response"]) for k in kept] == [("a?", "x"), ("a?", "v"), ("b?", "x")]
    assert kept[0]["qwen_text"] == "a?x" and kept[0]["reward_model"]["ground_truth"] == "7"
    assert report["rejected"] == {
        "wrong": 2,
        "malformed": 1,
        "too long": 1,
        "duplicate": 1,
        "over the cap": 1,
    }
    assert report["kept"] + sum(report["rejected"].values()) == report["rollouts"] == 9
    assert (report["right"], report["well_formed"]) == (7 / 9, 7 / 9)
    assert report["acceptance"] == 3 / 9
    assert report["violations"] == {"<think> is never closed": 2}


@pytest.mark.parametrize(
    ("loss", "budget", "kept"),
    [("response", 49, 0), ("response", 50, 1), ("sequential", 99, 0), ("sequential", 100, 1)],
)
def test_too_long_is_what_sft_could_not_train_on(loss, budget, kept):
    counted = {"fits": True, "first_call_tokens": 50, "all_tokens": 100}
    of_an_older_version = row("b?", "x")
    rows = [{**row("a?", "x"), **counted}, of_an_older_version]
    _, report = select(rows, 1, loss, budget)
    assert (report["kept"], report["rejected"]["too long"]) == (kept + 1, 1 - kept)


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(
        "self-train",
        tmp_path / "run",
        task={"name": str(write_task(tmp_path / "seven.jsonl")), "problems": 6},
        rollouts={
            "samples": 2,
            "chunk": 4,
            "generation": {"max_tokens": 20},
            "engine": {"kv_gigabytes": 0.01},
        },
        optimization={"max_steps": 2, "batch_tokens": 512},
    )


def test_an_empty_yield_stops_and_says_why_the_rejects_failed(run, capsys):
    assert run() == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "kept none of 12 rollouts (12 wrong, 0 malformed" in error
    chunks = sorted((run.folder / "rollouts").glob("chunk-*.json"))
    assert [len(json.loads(chunk.read_text())["rollouts"]) for chunk in chunks] == [8, 4]


def test_each_chunk_says_how_far_it_is(run, capsys, ticking_clock):
    assert run() == 2
    lines = capsys.readouterr().out.splitlines()
    for chunk, total in ((1, 8), (2, 4)):
        of_chunk = [line for line in lines if line.startswith(f"rolling out {chunk}/2: ")]
        assert re.search(rf"^rolling out {chunk}/2: \d/{total} responses, .* tokens/s", of_chunk[0])
        assert f" {total} graded, in " in of_chunk[-1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_among_rollouts_keeps_the_chunks_done_and_sets_the_exit_code(
    run, monkeypatch, fails, number
):
    roll_out = SelfTraining._roll_out

    def send_in_second(self, engine, chunk, *rest):
        if chunk == 1:
            os.kill(os.getpid(), number)
        return roll_out(self, engine, chunk, *rest)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(SelfTraining, "_roll_out", send_in_second)
        assert "--resume" in fails(run(), 128 + number)
    assert signal.getsignal(number) == before
    [chunk] = (run.folder / "rollouts").iterdir()
    saved = chunk.stat().st_mtime_ns
    assert "kept none of 12 rollouts" in fails(run("--resume"), 2)
    assert chunk.stat().st_mtime_ns == saved


@pytest.fixture
def problems_of_calls(monkeypatch) -> list[int]:
    """Makes every response a right one of two threads; counts the problems of each call."""
    roll_out = self_train.roll_out
    counts = []

    def rolled_out(engine, task, problems, *arguments, **options):
        counts.append(len(problems))
        graded = roll_out(engine, task, problems, *arguments, **options)
        return [replace(g, response=PARALLEL, correct=True, violations=[]) for g in graded]

    monkeypatch.setattr(self_train, "roll_out", rolled_out)
    return counts


def test_what_is_too_long_follows_the_settings_until_sft_begins(
    run, problems_of_calls, monkeypatch, fails
):
    def settings(loss: str, budget: int) -> list[str]:
        return ["--resume", "--loss", loss, "--optimization.batch_tokens", str(budget)]

    none_is_kept = "kept none of 12 rollouts (0 wrong, 0 malformed, 12 too long, "
    line = fails(run(*settings("response", 20)[1:]), 2)
    assert none_is_kept in line and "raise optimization.batch_tokens and resume" in line
    # 24 tokens up to the threads, 52 in all.
    assert none_is_kept in fails(run(*settings("sequential", 40)), 2)
    with monkeypatch.context() as patch:
        patch.setattr(SFTTrainer, "train_step", MagicMock(side_effect=KeyboardInterrupt))
        assert "interrupted" in fails(run(*settings("response", 40)), 130)
    assert none_is_kept in fails(run(*settings("sequential", 40)), 2)
    assert run(*settings("response", 40)) == 0
    assert run.summary()["kept"] == 6
    assert problems_of_calls == [4, 2, 4]


def test_rollouts_of_other_problems_are_not_taken_over(run, capsys):
    assert run() == 2
    capsys.readouterr()
    write_task(Path(run.settings["task"]["name"]), count=60)
    assert run("--resume") == 2
    assert "is not what" in capsys.readouterr().err


def test_problems_that_lie_elsewhere_are_taken_and_others_refused_before_they_are_rolled_out(
    run, problems_of_calls, tmp_path, fails
):
    assert "kept none" in fails(run("--optimization.batch_tokens", "20"), 2)
    (run.folder / "rollouts" / "chunk-1.json").unlink()
    moved = tmp_path / "moved.jsonl"
    write_task(moved, count=60)
    assert "is not what" in fails(run("--resume", "--task.name", str(moved)), 2)
    assert problems_of_calls == [4, 2]
    moved.write_bytes(Path(run.settings["task"]["name"]).read_bytes())
    assert run("--resume", "--task.name", str(moved)) == 0
    assert problems_of_calls == [4, 2, 2, 4]


def test_sft_allows_the_depth_of_blocks_that_rollouts_may_have(run, monkeypatch):
    right = "threadweaver.tasks.data_file.DataFile.submit"
    monkeypatch.setattr(right, lambda *_: lambda: True)
    seen = []

    def no_violations(prompt, response, max_depth):
        seen.append(max_depth)
        return []

    for module in ("evaluate.grade", "train.batches"):  # random bytes are no trajectory
        monkeypatch.setattr(f"threadweaver.{module}.violations", no_violations)
    run.settings["rollouts"]["generation"] = {"max_tokens": 2, "mode": "sequential", "max_depth": 3}
    run.settings["rollouts"]["samples"] = 8
    run.settings["optimization"]["max_steps"] = 1
    assert run() == 0 and set(seen) == {3}


def test_prompts_keep_what_they_are_through_rollouts_and_sft(tmp_path):
    messages = [{"role": "user", "content": "a <think> b"}]
    rows = [row("Q", "x"), row("P", "y"), row("M", "z")]
    rows[1]["rendered"] = True
    rows[2] |= {"question": messages, "ground_truth": ["7", "8"]}
    kept, _ = select(rows, 1, "response", 512)
    save_rows(kept, tmp_path / "kept.jsonl")
    examples = load_examples(tmp_path / "kept.jsonl")
    assert [example.prompt for example in examples] == ["Q", "P", messages]
    assert [isinstance(example.prompt, Rendered) for example in examples] == [False, True, False]
    assert [example.response for example in examples] == ["x", "y", "z"]
    assert examples[2].ground_truth == ("7", "8")


def test_what_is_kept_is_what_sft_reads(run, monkeypatch):
    right = "threadweaver.tasks.data_file.DataFile.submit"
    monkeypatch.setattr(right, lambda *_: lambda: True)
    for module in ("evaluate.grade", "train.batches"):  # random bytes are no trajectory
        monkeypatch.setattr(f"threadweaver.{module}.violations", lambda *_: [])
    run.settings["rollouts"]["generation"] = {"max_tokens": 8, "mode": "sequential"}
    run.settings["rollouts"]["samples"] = 16  # one without a control token for each problem
    assert run() == 0
    assert len(load_examples(run.folder / "kept.jsonl")) == run.summary()["kept"] == 6


def test_prompts_that_do_not_fit_are_skipped_and_counted(run, capsys):
    path = Path(run.settings["task"]["name"])
    questions = ["x" * 600, "x" * 700, "a?\n", "x" * 800]
    rows = [{"question": q, "ground_truth": "7", "response": "a"} for q in questions]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run.settings["model"] = {"arch": {**ARCH, "max_position_embeddings": 512}}
    run.settings["task"] |= {"problems": None, "options": {"held_out": 0}}
    run.settings["rollouts"] |= {"chunk": 2}
    assert run() == 2
    shown = capsys.readouterr()
    assert "training problems: 3 of 4 prompts are skipped: " in shown.out
    assert f"{path}:1: the prompt has 600 tokens" in shown.out
    assert "kept none of 2 rollouts" in shown.err
    chunks = [json.loads((run.folder / f"rollouts/chunk-{n}.json").read_text()) for n in (0, 1)]
    assert [chunk["skipped_prompts"] for chunk in chunks] == [2, 1]
    assert [len(chunk["rollouts"]) for chunk in chunks] == [0, 2]
    assert run("--resume") == 2
    assert "kept none of 2 rollouts" in capsys.readouterr().err


def test_prompts_that_leave_no_room_in_a_trie_are_skipped(run, problems_of_calls, capsys):
    """Before SFT and after it alike, whatever the budget is by then."""
    path = Path(run.settings["task"]["name"])
    questions = ["x" * 60, "a?", "b?", "x" * 59]
    rows = [{"question": q, "ground_truth": "7", "response": "a"} for q in questions]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run.settings["task"] |= {"problems": None, "options": {"held_out": 0}}
    run.settings["rollouts"] |= {"chunk": 4}
    run.settings["optimization"]["batch_tokens"] = 60
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SelfTraining, "_select", MagicMock(side_effect=KeyboardInterrupt))
        assert run() == 130
    shown = capsys.readouterr().out
    assert "training problems: 1 of 4 prompts are skipped: " in shown
    assert f"{path}:1: the prompt has 60 tokens, and a path at most 60 (optimization.b" in shown
    run.settings["optimization"]["batch_tokens"] = 512
    assert run("--resume") == 0
    assert problems_of_calls == [3, 3]
    assert run.summary()["skipped_prompts"] == 1


def test_a_run_without_a_prompt_that_fits_is_refused(run, capsys):
    run.settings["model"] = {"arch": {**ARCH, "max_position_embeddings": 2}}
    assert run() == 2
    error = capsys.readouterr().err
    assert "none of 6 prompts leaves room for a response" in error and error.count("\n") == 1
    assert not list(run.folder.glob("rollouts/*"))


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"model": {"path": "/dev/null"}}, "model.path"), ({"template": {"system": "x"}}, "template")],
)
def test_a_model_that_cannot_be_used_is_refused_before_the_run_begins(run, fails, settings, named):
    run.settings |= settings
    assert named in fails(run(), 2)
    assert not run.folder.exists()
