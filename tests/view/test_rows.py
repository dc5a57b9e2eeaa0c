"""Trajectories out of every kind of file that holds some."""

import json

import pytest

from threadweaver.data import DataError, save_rows, trajectory_row
from threadweaver.trajectory import Rendered
from threadweaver.view.rows import read_trajectories

GRADED = {
    "question": "1+1?",
    "ground_truth": "2",
    "response": "</think>\\boxed{2}",
    "correct": True,
    "violations": ["line 1: </think> closes no <think>"],
    "total_tokens": 7,
    "longest_path_tokens": 5,
    "source": "f:1",
}


def test_rows_of_a_data_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    messages = [{"role": "user", "content": "hi"}]
    save_rows([trajectory_row("q", "r", 2), trajectory_row(messages, "s", [3, 4])], path)
    first, second = read_trajectories(str(path))
    assert (first.prompt, first.response, first.answer) == ("q", "r", "2")
    assert (second.prompt, second.response, second.answer) == (messages, "s", "3 or 4")
    assert first.correct is first.violations is first.tokens is None
    assert first.source == f"{path}:1"


def test_a_row_that_is_one_text_is_split_as_training_splits_it(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "q", "qwen_text": "q<think></think>a"}))
    [row] = read_trajectories(str(path))
    assert (row.prompt, row.response) == ("q", "<think></think>a")


def test_a_prompt_that_is_rendered_stays_so(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{**GRADED, "rendered": True}, {"qwen_text": "<|a|>qr", "response": "r"}, GRADED]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = [row.prompt for row in read_trajectories(str(path))]
    assert prompts == ["1+1?", "<|a|>q", "1+1?"]
    assert [isinstance(prompt, Rendered) for prompt in prompts] == [True, True, False]


def test_answers_of_generate_may_be_empty_or_hold_anything(tmp_path):
    path = tmp_path / "answers.jsonl"
    prompts = ["q", Rendered("<|a|>q")]
    responses = ["", " \n", "<|im_start|> <think>"]
    save_rows([trajectory_row(p, r, 2) for p in prompts for r in responses], path)
    found = [(row.prompt, row.response) for row in read_trajectories(str(path))]
    assert found == [(p, r) for p in ("q", "<|a|>q") for r in responses]


def test_rows_of_an_evaluation(tmp_path):
    path = tmp_path / "responses.jsonl"
    row = {"mode": "parallel", "sample": 0, "prompt": "1+1?", "answer": "2", **GRADED}
    del row["question"], row["ground_truth"]
    path.write_text(json.dumps(row) + "\n" + json.dumps({**row, "response": ""}) + "\n")
    found, empty = read_trajectories(str(path))
    assert (found.prompt, found.answer, found.correct, found.mode) == (
        "1+1?",
        "2",
        True,
        "parallel",
    )
    assert found.violations == GRADED["violations"] and found.tokens == (7, 5)
    assert empty.response == ""


@pytest.mark.parametrize("whole", [{"problems": "x", "means": {}, "rollouts": [GRADED]}, [GRADED]])
def test_rollouts_of_a_run(tmp_path, whole):
    (tmp_path / "chunk-0.json").write_text(json.dumps(whole))
    (tmp_path / "chunk-1.json").write_text(json.dumps(whole))
    rows = list(read_trajectories(str(tmp_path)))
    assert [row.source for row in rows] == [f"{tmp_path}/chunk-{n}.json, rollout 1" for n in (0, 1)]
    assert rows[0].answer == "2" and rows[0].correct is True


def test_what_a_row_says_nonsense_of_is_left_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = {
        **GRADED,
        "correct": "yes",
        "violations": "none",
        "total_tokens": float("nan"),
        "mode": 3,
    }
    path.write_text(json.dumps(row))
    [found] = read_trajectories(str(path))
    assert found.correct is found.violations is found.tokens is found.mode is None


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("none.jsonl", None, "no such file"),
        ("page.html", "x", "unknown extension"),
        ("rows.jsonl", '{"question": "q"}', "rows.jsonl:1"),
        ("rows.jsonl", "[1]", "found a list"),
        ("rows.json", '{"rollouts": []}', "holds no rollouts"),
        ("rows.json", "[1]", "rollout 1: is no object"),
        ("rows.json", '{"rollouts": 1', "not JSON"),
    ],
)
def test_a_file_without_trajectories_says_where_and_why(tmp_path, name, text, says):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=says):
        list(read_trajectories(str(tmp_path / name)))
