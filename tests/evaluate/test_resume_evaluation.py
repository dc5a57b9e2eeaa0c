"""`python -m threadweaver.evaluate`: stopped and started again, on a server, with overlap."""

from __future__ import annotations

import json
from itertools import combinations

import numpy as np
import pytest

from tests.completions_server import Fault, serve
from tests.evaluate.conftest import KNOWN, asking
from tests.held import Held
from tests.products import PROMPTS, RESPONSES
from threadweaver.evaluate.__main__ import main
from threadweaver.evaluate.metrics import pass_at
from threadweaver.generate.engine import Engine


@pytest.fixture
def solve(folder, tmp_path):
    """Evaluates both products in a folder of its own; options given later win."""
    pytest.importorskip("math_verify")
    arguments = asking(KNOWN, folder, tmp_path)
    return lambda *options: main(arguments(*options))


def figures(path) -> dict:
    """What does not depend on the clock."""
    record = json.loads((path / "e.json").read_text())
    for mode in ("sequential", "parallel"):
        for name in ("seconds", "resumed", "tokens_per_second", "latency_seconds"):
            record[mode].pop(name)
    record["comparison"].pop("wall_clock_speedup")
    return record


def responses(path) -> list[dict]:
    rows = [json.loads(line) for line in (path / "r.jsonl").read_text().splitlines()]
    assert all(row.pop("seconds") > 0 for row in rows)
    return rows


def interrupt_after(steps: int, monkeypatch) -> None:
    step, count = Engine.step, iter(range(10**6))

    def stopping(self):
        if next(count) == steps:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Engine, "step", stopping)


def test_an_evaluation_that_was_stopped_twice_comes_out_as_one_that_was_not(
    solve, tmp_path, monkeypatch, capsys
):
    hot = ["--mode", "both", "--samples", "4", "--temperature", "2", "--max_tokens", "30"]
    hot += ["--max_sequences", "4"]
    assert solve(*hot) == 0
    whole = figures(tmp_path), responses(tmp_path)
    for name in ("e.json", "r.jsonl"):
        (tmp_path / name).unlink()
    counts = []
    for steps in (60, 60):
        with monkeypatch.context() as patch:
            interrupt_after(steps, patch)
            assert solve(*hot) == 130
        counts.append((tmp_path / "r.jsonl.partial").read_text().count("\n") - 1)
        error = capsys.readouterr().err
        assert f"{counts[-1]} responses are kept: give the same command to go on" in error
    assert 0 < counts[0] < counts[1] < 16 and not (tmp_path / "r.jsonl").exists()
    assert solve(*hot, "--samples", "3") == 2
    assert "r.jsonl.partial was begun with samples 4, not 3" in capsys.readouterr().err
    assert solve(*hot) == 0
    assert f"{counts[1]} responses are there already" in capsys.readouterr().out
    assert (figures(tmp_path), responses(tmp_path)) == whole
    record = json.loads((tmp_path / "e.json").read_text())
    assert sum(record[mode]["resumed"] for mode in ("sequential", "parallel")) == counts[1]
    assert not (tmp_path / "r.jsonl.partial").exists()


def test_a_resumed_evaluation_overwrites_no_other_file_unasked(
    solve, tmp_path, monkeypatch, capsys
):
    other, short = tmp_path / "other.json", ["--max_sequences", "1", "--max_tokens", "30"]
    other.write_text("mine\n")
    with monkeypatch.context() as patch:
        interrupt_after(60, patch)
        assert solve(*short) == 130
    partial = tmp_path / "r.jsonl.partial"
    kept = partial.read_bytes()
    capsys.readouterr()
    assert solve(*short, "--json", str(other)) == 2
    assert f"error: {other}: there already; name another place" in capsys.readouterr().err
    assert other.read_text() == "mine\n" and partial.read_bytes() == kept
    # That --overwrite allows it does not begin anew.
    assert solve(*short, "--json", str(other), "--overwrite") == 0
    assert "responses are there already" in capsys.readouterr().out
    assert json.loads(other.read_text())["parallel"]["resumed"] > 0


def test_of_a_response_that_is_done_the_text_alone_is_held(solve, tmp_path, monkeypatch):
    hot = ["--mode", "both", "--samples", "12", "--temperature", "2", "--max_tokens", "30"]
    hot += ["--max_sequences", "4"]
    with monkeypatch.context() as patch:
        interrupt_after(250, patch)
        held = Held(patch)
        assert solve(*hot) == 130
    kept = (tmp_path / "r.jsonl.partial").read_text().count("\n") - 1
    assert kept > 24 and held.count > 2 * kept and held.most <= 8
    with monkeypatch.context() as patch:
        held = Held(patch)
        assert solve(*hot) == 0
    assert held.count > kept + 2 * (48 - kept) and held.most <= 8


def test_files_that_are_there_are_not_overwritten_unasked(solve, tmp_path, capsys):
    (tmp_path / "r.jsonl").write_text("mine\n")
    assert solve() == 2
    assert f"{tmp_path}/r.jsonl: there already" in capsys.readouterr().err
    assert (tmp_path / "r.jsonl").read_text() == "mine\n"
    assert solve("--overwrite", "--max_tokens", "5") == 0
    assert len(responses(tmp_path)) == 2


def test_pass_at_k_is_that_of_all_choices_of_k_samples():
    for samples, right, k in ((5, 2, 1), (5, 2, 3), (5, 0, 2), (5, 5, 2), (6, 1, 6), (4, 3, 2)):
        outcomes = [True] * right + [False] * (samples - right)
        choices = list(combinations(outcomes, k))
        share = sum(map(any, choices)) / len(choices)
        assert pass_at(k, np.array([float(right)]), samples)[0] == pytest.approx(share)


def test_avg_and_pass_at_every_power_of_two_are_shown(solve, tmp_path, capsys):
    assert solve("--samples", "6", "--max_tokens", "5") == 0
    shown = capsys.readouterr().out
    for name in ("accuracy (avg@6)", "pass@2", "pass@4", "pass@6", "latency seconds"):
        assert name in shown
    record = json.loads((tmp_path / "e.json").read_text())["parallel"]
    assert [name for name in record if name.startswith("pass@")] == ["pass@2", "pass@4", "pass@6"]
    assert record["pass@2"] == {"value": 0, "low": 0, "high": pytest.approx(0.658, abs=1e-3)}


def test_a_benchmark_has_its_own_number_of_samples(solve, tmp_path):
    path = tmp_path / "aime.jsonl"
    path.write_text(json.dumps({"problem": PROMPTS[0], "answer": "602"}) + "\n")
    options = ["--task", "aime24", "--task_options", f"{{path: {path}}}", "--max_tokens", "300"]
    assert solve(*options, "--samples", "2") == 0
    assert [row["correct"] for row in responses(tmp_path)] == [True] * 2
    assert solve(*options, "--max_tokens", "2", "--overwrite") == 0
    assert len(responses(tmp_path)) == 32


def test_overlap_with_training_files_is_shown_and_kept(solve, tmp_path, capsys):
    train = tmp_path / "train.jsonl"
    train.write_text(json.dumps({"question": PROMPTS[1], "response": "x"}) + "\n")
    assert solve("--max_tokens", "3", "--overlap", str(train)) == 0
    shown = capsys.readouterr().out
    assert "overlap: 1 of 2 problems and 1 of 1 training rows have 13 words in a row" in shown
    assert f"products.jsonl:2 and {train}:1: '" in shown
    record = json.loads((tmp_path / "e.json").read_text())
    assert record["overlap"]["problems_shared"] == 1


def test_a_server_decodes_and_its_rows_stand_beside_those_of_the_engine(
    solve, folder, tmp_path, capsys
):
    pytest.importorskip("openai")
    assert solve("--mode", "both") == 0
    ours = responses(tmp_path)
    with serve(folder, "token_ids") as server:
        options = ["--mode", "both", "--server", f"{server.url}/v1", "--server_retries", "0"]
        assert solve(*options, "--overwrite") == 0
        theirs = responses(tmp_path)
        record = json.loads((tmp_path / "e.json").read_text())
        for row in (*ours, *theirs):
            row.pop("decode_steps")
        assert theirs == ours and [row["response"] for row in ours] == RESPONSES * 2
        assert "decode_steps" not in record["parallel"] and record["server"]["url"] == options[3]
        assert record["parallel"]["latency_seconds"]["value"] > 0
        assert record["parallel"]["tokens_per_second"] > 0
        capsys.readouterr()
        # One that fails on the way: what came is kept, and the same command goes on.
        server.fault, server.after = Fault(status=500), len(server.asked) + 9
        assert solve(*options, "--overwrite") == 1
        error = capsys.readouterr().err.splitlines()[-1]  # after progress, where it is slow
        assert error.startswith("error: ")
        assert "answers 500" in error and "responses are kept" in error
        server.fault = None
        assert solve(*options, "--overwrite") == 0
        assert "responses are there already" in capsys.readouterr().out
        again = responses(tmp_path)
        for row in again:
            row.pop("decode_steps")
        assert again == ours
        assert solve("--server", server.url, "--server_model", "big", "--overwrite") == 1
        assert "no model 'big': it offers tiny" in capsys.readouterr().err
    assert solve("--server", "localhost:1", "--overwrite") == 2
    assert "server is 'localhost:1': give its address" in capsys.readouterr().err
    assert solve("--server_model", "a", "--overwrite") == 2
    assert "server_model: give --server too" in capsys.readouterr().err
