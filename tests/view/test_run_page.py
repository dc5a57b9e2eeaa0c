"""The page of a run, finished, running or damaged."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from tests.view.browser import Opened, data_of
from threadweaver.lock import FolderLock
from threadweaver.view.run import MAX_POINTS, check_run, run_page, watch
from threadweaver.whole_file import write_whole

GRADED = {"question": "1+1?", "ground_truth": "2", "response": "\\boxed{2}", "violations": []}


def record(step: int, **figures) -> str:
    return json.dumps({"step": step, "loss": 2 / step, **figures}) + "\n"


@pytest.fixture
def run(tmp_path) -> Path:
    """A pipeline in the midst of P-GRPO."""
    folder = tmp_path / "demo"
    for stage in ("sft", "self_train", "self_train/sft", "rl"):
        (folder / stage).mkdir(parents=True)
        (folder / stage / "config.yaml").write_text("seed: 0\n")
    (folder / "config.yaml").write_text("seed: 7\n")
    lines = [record(n, **({"validation_loss": 1.0} if n % 5 == 0 else {})) for n in range(1, 21)]
    (folder / "sft" / "metrics.jsonl").write_text("".join(lines))
    lines = [record(n, reward=n / 9, accuracy=0.5, redundancy=0.25) for n in range(1, 10)]
    (folder / "rl" / "metrics.jsonl").write_text("".join(lines))
    for stage in ("sft", "self_train", "self_train/sft"):
        (folder / stage / "summary.json").write_text("{}")
    rows = [
        {**GRADED, "correct": True},
        {**GRADED, "correct": False},
        {**GRADED, "correct": True, "violations": ["line 1: odd"]},
    ]
    (folder / "self_train" / "rollouts").mkdir()
    chunk = json.dumps({"problems": "x", "means": {}, "rollouts": rows})
    (folder / "self_train" / "rollouts" / "chunk-0.json").write_text(chunk)
    (folder / "evaluation").mkdir()
    means = {"accuracy": 0.9, "total_tokens": 20.0, "longest_path_tokens": 10.0, "detail": {}}
    both = json.dumps({"parallel": means, "sequential": means})
    (folder / "evaluation" / "sft.json").write_text(both)
    (folder / "evaluation" / "sft-parallel.json").write_text(json.dumps(rows))
    return folder


def seen(run: Path) -> dict:
    return data_of(run_page(run))["run"]


def test_stages_curves_rejects_and_samples_are_those_of_the_files(run):
    found = seen(run)
    stages = {stage["name"]: stage for stage in found["stages"]}
    assert list(stages) == ["sft", "self_train", "self_train/sft", "rl"]
    assert [stage["finished"] for stage in stages.values()] == [True, True, True, False]
    sft = stages["sft"]
    assert sft["steps"] == list(range(1, 21)) and sft["figures"]["loss"][3] == 0.5
    assert sft["figures"]["validation_loss"][:5] == [None] * 4 + [1.0]
    assert stages["rl"]["last"]["redundancy"] == 0.25 and stages["rl"]["done"] == 9
    assert [(row["stage"], row["mode"]) for row in found["table"]] == [
        ("sft", "parallel"),
        ("sft", "sequential"),
    ]
    rejects = found["rejects"]
    assert (rejects["rollouts"], rejects["kept"], rejects["so_far"]) == (3, 1, True)
    assert rejects["rejected"] == {"wrong": 1, "malformed": 1}
    kinds = [sample["kind"] for sample in found["samples"]]
    assert kinds == ["malformed", "wrong", "right"] * 2 and found["damaged"] == []
    assert not found["finished"]


def test_a_selection_stands_for_what_was_counted_so_far(run):
    made = {"rollouts": 9, "kept": 8, "rejected": {"wrong": 1}, "violations": {}}
    (run / "self_train" / "selection.json").write_text(json.dumps(made))
    assert seen(run)["rejects"] == {**made, "so_far": False}


def test_half_a_line_at_the_end_is_no_damage(run):
    with (run / "rl" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "lo')
    found = seen(run)
    assert found["stages"][-1]["steps"][-1] == 9 and found["damaged"] == []


def test_damaged_lines_and_files_are_counted_and_named(run):
    lines = [record(1), "{\n", '{"step": "x"}\n', "\xff\n", record(2, loss=float("nan")), record(3)]
    (run / "rl" / "metrics.jsonl").write_bytes("".join(lines).encode("latin-1"))
    (run / "self_train" / "rollouts" / "chunk-0.json").write_text('{"rollouts": [')
    (run / "evaluation" / "sft.json").write_text("no")
    found = seen(run)
    rl = found["stages"][-1]
    assert rl["steps"] == [1, 2, 3] and rl["figures"]["loss"] == [2, None, 2 / 3]
    assert (
        "rl/metrics.jsonl: 3 lines that are no record of a step, left out: 2, 3, 4"
        in found["damaged"]
    )
    said = "\n".join(found["damaged"])
    assert "chunk-0.json" in said and "evaluation/sft.json" in said


def test_files_of_other_shapes_are_no_error(run):
    for name in (
        "evaluation/sft.json",
        "evaluation/sft-parallel.json",
        "self_train/selection.json",
    ):
        for text in (
            *("[]", "3", '{"parallel": 1, "rollouts": 2}', "[1]", "null", "[" * 9999),
            '[{"response": "a", "violations": 3}]',
            f'{{"parallel": {{"accuracy": 1{"0" * 400}, "format": NaN}}}}',
            '{"rollouts": 1, "kept": 1, "rejected": {"wrong": NaN}, "violations": {"a": []}}',
        ):
            (run / name).write_text(text)
            seen(run)
    (run / "self_train" / "selection.json").unlink()
    (run / "self_train" / "rollouts" / "chunk-1.json").write_text('[{"violations": 3}]')
    assert seen(run)["rejects"]["rollouts"] == 4


def test_long_curves_are_thinned_and_rare_figures_kept(run):
    rare = {n: {"validation_loss": 1.0} for n in range(7, 30_000, 3001)}
    lines = (record(n, **rare.get(n, {})) for n in range(1, 30_001))
    (run / "sft" / "metrics.jsonl").write_text("".join(lines))
    sft = seen(run)["stages"][0]
    assert len(sft["steps"]) <= MAX_POINTS + 20 and sft["steps"][-1] == 30_000 == sft["done"]
    kept = [s for s, v in zip(sft["steps"], sft["figures"]["validation_loss"], strict=True) if v]
    assert kept == list(rare)


@pytest.mark.parametrize("what", ["none", "file", "empty"])
def test_a_folder_that_is_no_run_is_refused(tmp_path, what):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ValueError, match={"none": "no such", "file": "is a file"}.get(what, "no run")
    ):
        check_run(tmp_path / what)


def test_watching_ends_with_the_run_and_leaves_a_page_at_rest(run, tmp_path):
    out = tmp_path / "page.html"
    thread = threading.Thread(target=watch, args=(run, out, 0.05))
    thread.start()
    while not out.exists():
        thread.join(0.02)
    reloads = data_of(out.read_text())["about"]["reload"]
    (run / "summary.json").write_text("{}")
    thread.join(120)
    assert not thread.is_alive() and reloads == 0.05
    data = data_of(out.read_text())
    assert data["about"]["reload"] is None and data["run"]["finished"]


def test_watching_ends_with_a_run_that_failed(run, tmp_path):
    """It writes no summary.json; its lock goes however it ends."""
    out = tmp_path / "page.html"
    lock = FolderLock(run)
    thread = threading.Thread(target=watch, args=(run, out, 0.05))
    thread.start()
    while not out.exists():
        thread.join(0.02)
    assert data_of(out.read_text())["run"]["running"]
    lock.release()
    thread.join(10)
    ended = not thread.is_alive()
    (run / "summary.json").write_text("{}")
    thread.join(10)
    assert ended
    data = data_of(out.read_text())
    assert data["about"]["reload"] is None
    assert not data["run"]["running"] and not data["run"]["finished"]


def test_watching_waits_for_a_run_that_is_not_resumed_yet(run, tmp_path):
    out = tmp_path / "page.html"
    thread = threading.Thread(target=watch, args=(run, out, 0.02))
    thread.start()
    thread.join(0.2)
    assert thread.is_alive() and not data_of(out.read_text())["run"]["running"]
    (run / "summary.json").write_text("{}")
    thread.join(10)
    assert not thread.is_alive()


def test_a_chunk_is_counted_once_until_it_changes(run, monkeypatch):
    rollouts = run / "self_train" / "rollouts"
    chunk = rollouts / "chunk-0.json"
    for number in (1, 2):
        (rollouts / f"chunk-{number}.json").write_text(chunk.read_text())
    read, taken = Path.read_bytes, []
    monkeypatch.setattr(Path, "read_bytes", lambda path: taken.append(path.name) or read(path))
    assert seen(run)["rejects"]["rollouts"] == 9 and "chunk-0.json" in taken
    for path in rollouts.iterdir():
        os.utime(path, ns=(1, {"chunk-2.json": 3}.get(path.name, 2)))  # whose samples are shown
    seen(run)
    taken.clear()
    found = seen(run)["rejects"]
    assert [name for name in taken if "chunk" in name] == ["chunk-2.json"]
    assert (found["rollouts"], found["kept"]) == (9, 3)
    assert found["violations"] == {"odd": 3}
    chunk.write_text("[{}]")
    assert seen(run)["rejects"]["rollouts"] == 7


def test_a_watched_page_reads_itself_anew_and_keeps_what_was_chosen(run, browser, tmp_path):
    path = tmp_path / "page.html"
    write_whole(path, run_page(run, 2.0))
    page = Opened(browser, path)
    page.view.click("#tabs button >> nth=0")
    with (run / "rl" / "metrics.jsonl").open("a") as file:
        file.write(record(777, reward=1.0))
    write_whole(path, run_page(run, 2.0))
    page.view.wait_for_selector("#stages >> text=777")
    page.view.click("#pause")
    assert page.view.get_attribute("#tabs button >> nth=0", "aria-selected") == "true"
    page.close()


def test_curves_can_be_read_off_and_found(run, browser, tmp_path):
    write_whole(tmp_path / "page.html", run_page(run))
    page = Opened(browser, tmp_path / "page.html", "dark")
    names = page.view.eval_on_selector_all(".chart h3", "all => all.map(h => h.textContent)")
    assert names == ["loss", "reward", "accuracy", "redundancy"]
    page.view.fill("#search", "redun")
    assert page.view.locator(".chart").count() == 1
    page.view.fill("#search", "reward")
    box = page.view.locator(".chart svg").bounding_box()
    page.view.mouse.move(box["x"] + 2, box["y"] + 20)
    assert page.view.inner_text(".chart .name .number").strip() == "0.1111"
    assert "step 1" in page.view.inner_text("#legend")
    page.view.click("details.sample >> nth=0")
    assert "line 1: odd" in page.view.inner_text("#responses")
    page.close()
