import io
import subprocess
import sys
from pathlib import Path

import pytest

from threadweaver.data import load_examples, save_rows
from threadweaver.tasks import __main__ as tasks
from threadweaver.tasks import load_task


def write(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "threadweaver.tasks", "write", "--out", str(out), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("parallel", ["true", "false"])
def test_problems_with_demonstrations_become_training_rows(tmp_path, parallel):
    sizes = ["--train", "9", "--validation", "4", "--seed", "3", "--parallel", parallel]
    done = write(tmp_path, "--task", "multiplication", "--options.digits", "3", *sizes)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 2  # it was quick
    task = load_task("multiplication", digits=3)
    halves = {
        "train": task.problems("train", 9, 3),
        "validation": task.problems("validation", 4, 3),
    }
    for split, problems in halves.items():
        examples = load_examples(tmp_path / f"{split}.jsonl")
        assert [(e.prompt, e.ground_truth) for e in examples] == [
            (p.prompt, p.answer) for p in problems
        ]
        for example, problem in zip(examples, problems, strict=True):
            assert example.response == task.demonstration(problem, parallel == "true")


def test_how_far_it_is_when_it_takes_long(tmp_path, capsys, ticking_clock):
    tasks.multiplication(tmp_path / "a", train=20, validation=2)
    tasks.write("multiplication", tmp_path / "b", train=20, validation=2)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    for folder in "ab":
        assert f"{tmp_path / folder / 'train.jsonl'}: 20 rows" in lines
    assert sum(line.startswith("train.jsonl: 5/20 rows, ") for line in lines) == 2
    assert sum(line.startswith("train.jsonl: 20/20 rows, in ") for line in lines) == 2


def test_problems_without_demonstrations_become_prompts(tmp_path):
    sizes = ["--train", "5", "--validation", "2", "--format", "parquet"]
    done = write(tmp_path, "--task", "reasoning_gym:gcd", *sizes)
    assert done.returncode == 0, done.stderr
    problems = load_task("reasoning_gym:gcd").problems("train", 5)
    examples = load_examples(tmp_path / "train.parquet", responses=False)
    assert [(e.prompt, e.response, e.ground_truth) for e in examples] == [
        (p.prompt, "", p.answer) for p in problems
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "multiplicaton"], "did you mean 'multiplication'"),
        (["--task", "multiplication", "--options.digit", "3"], "no option 'digit'"),
        (["--task", "multiplication", "--train", "99999"], "train problems, not 99999"),
        (["--task", "multiplication", "--train", "0"], "train is 0: it must be at least 1"),
        (["--task", "reasoning_gym:graph_color"], "no right answer is on record"),
    ],
)
def test_what_cannot_be_written_is_refused_in_one_line(tmp_path, arguments, message):
    done = write(tmp_path, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_bad_row_of_a_data_file_is_named(tmp_path):
    save_rows([{"question": "Q", "ground_truth": "4"}, {"question": "Q"}], tmp_path / "rows.jsonl")
    done = write(tmp_path / "out", "--task", str(tmp_path / "rows.jsonl"))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path / 'rows.jsonl'}:2: no field ")


def test_rows_with_one_right_answer_and_with_several_are_written_as_parquet(tmp_path):
    rows = [{"question": f"{n}?", "answer": ["1", "2"][: 1 + n % 2]} for n in range(40)]
    save_rows(rows, tmp_path / "rows.jsonl")
    sizes = ["--train", "20", "--validation", "2", "--options.held_out", "0.3"]
    given = ["write", "--task", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path), *sizes]
    assert tasks.main([*given, "--format", "parquet"]) == 0
    found = load_examples(tmp_path / "train.parquet", responses=False)
    assert {e.ground_truth for e in found} == {"1", ("1", "2")}


def test_files_that_are_there_are_not_overwritten_unasked(tmp_path, monkeypatch, capsys):
    arguments = ["multiplication", "--out", str(tmp_path), "--train", "2", "--validation", "1"]
    assert tasks.main(arguments) == 0
    before = (tmp_path / "train.jsonl").read_bytes()
    capsys.readouterr()
    again = [*arguments, "--seed", "1"]
    assert tasks.main(again) == 2
    error = capsys.readouterr().err
    assert "train.jsonl" in error and "--overwrite" in error and error.count("\n") == 1
    for answer, code in (("n", 2), ("", 2), ("y", 0)):
        monkeypatch.setattr("sys.stdin", io.StringIO(answer + "\n"))
        monkeypatch.setattr("sys.stdin.isatty", lambda: True)
        monkeypatch.setattr("sys.stderr.isatty", lambda: True)
        assert (tmp_path / "train.jsonl").read_bytes() == before
        assert tasks.main(again) == code
    assert (tmp_path / "train.jsonl").read_bytes() != before
    monkeypatch.undo()
    assert tasks.main([*arguments, "--overwrite"]) == 0
    assert (tmp_path / "train.jsonl").read_bytes() == before


def test_a_folder_that_is_none_is_refused_before_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tasks, "split_problems", None)
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert tasks.main(["multiplication", "--out", str(out)]) == 2
        assert str(out) in capsys.readouterr().err
