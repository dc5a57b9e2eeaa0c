import json
import sys
import time
from pathlib import Path

import pytest

from threadweaver.data import DataError, load_examples, save_rows, trajectory_row
from threadweaver.tasks import GradesInBackground, load_task
from threadweaver.tasks.data_file import DataFile
from threadweaver.tasks.multiplication import Multiplication


def task_of(path: Path, *rows: object, **options) -> DataFile:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = load_task(str(path), **options)
    assert isinstance(task, DataFile)
    return task


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"question": "2+2?", "reward_model": {"ground_truth": "4", "style": "rule"}}, "2+2?"),
        (
            {
                "data_source": "m",
                "prompt": [{"role": "user", "content": "2+2?"}],
                "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": "4"},
                "extra_info": {"index": 0},
            },
            [{"role": "user", "content": "2+2?"}],
        ),
        ({"question": "2+2?", "qwen_text": "2+2?</think>\\boxed{4}", "ground_truth": 4}, "2+2?"),
    ],
)
def test_prompts_and_answers_are_read_with_or_without_responses(tmp_path, name, row, prompt):
    path = tmp_path / name
    save_rows([row] * 3, path)
    problems = load_task(str(path), held_out=1.0).problems("validation", None)
    assert [(p.prompt, p.answer) for p in problems] == [(prompt, "4")] * 3
    assert all(p.source.startswith(str(path)) for p in problems)


ANSWERS = [
    ("\\frac{1}{2}", "0.5", True),
    ("\\frac{1}{2}", "\\frac{2}{4}", True),
    ("\\frac{1}{2}", "1/3", False),
    ("2\\sqrt{3}", "\\sqrt{12}", True),
    ("(x+1)^2", "x^2+2x+1", True),
    ("(x+1)^2", "x^2+2x+2", False),
    ("1234", "1,234", True),
    ("42", "0042", True),
    ("42", "", False),
    ("$\\boxed{42}$", "42", True),
    ("\\{1,2\\}", "\\{2,1\\}", True),
    ("\\text{Monday}", "Monday", True),
    ("Monday", "Tuesday", False),
]


def test_answers_are_compared_as_mathematics(tmp_path):
    rows = [{"question": f"{i}?", "ground_truth": truth} for i, (truth, _, _) in enumerate(ANSWERS)]
    task = task_of(tmp_path / "rows.jsonl", *rows, held_out=0.0, seconds=20)
    problems = task.problems("train", None)
    verdicts = [
        task.is_correct(f"<think>\n</think>\n\\boxed{{{answer}}}", problem)
        for problem, (_, answer, _) in zip(problems, ANSWERS, strict=True)
    ]
    assert verdicts == [right for _, _, right in ANSWERS]
    assert task.ungraded == 0


def test_an_answer_that_never_ends_is_wrong_and_counted(tmp_path):
    row = {"question": "?", "ground_truth": "42"}
    task = task_of(tmp_path / "rows.jsonl", row, held_out=0.0, seconds=1.5)
    (problem,) = task.problems("train", 1)
    assert task.is_correct("</think>\\boxed{9^{9^{9^{9}}}}", problem) is False
    assert task.ungraded == 1
    assert task.is_correct("</think>\\boxed{42}", problem) is True
    assert task.is_correct("</think>\\boxed{41+1}", problem) is True


# Each takes longer than anyone waits, at another place in the parser and in the comparison.
BOMBS = [
    "9^{9^{9^{9}}}",
    "(10^6)!",
    "((10^3)!)!",
    "\\sum_{k=1}^{10^9}\\frac{1}{k^2}",
    "\\prod_{k=1}^{10^7}k",
    "\\binom{10^9}{10^8}",
    "(x+y+z+w)^{200}",
    "\\sin(10^{10^9})",
    "(" * 400 + "1" + ")" * 400,
    "\\sqrt{" * 200 + "2" + "}" * 200,
    "\\frac{" * 2000,
    "|" * 500,
    "+".join(f"x_{{{i}}}^{i}" for i in range(300)),
    "1" * 9999,
]


def test_hostile_answers_are_wrong_and_hold_up_no_other(tmp_path):
    row = {"question": "?", "ground_truth": "42"}
    task = task_of(tmp_path / "rows.jsonl", row, held_out=0.0, seconds=0.3)
    (problem,) = task.problems("train", 1)
    assert isinstance(task, GradesInBackground)
    assert task.is_correct("\\boxed{42}", problem)  # its server has started
    start = time.monotonic()
    waiting = [task.submit(f"\\boxed{{{answer}}}", problem) for answer in [*BOMBS, "41+1"]]
    assert time.monotonic() - start < 20  # none is waited for
    assert [verdict() for verdict in waiting] == [False] * len(BOMBS) + [True]
    assert 6 <= task.ungraded <= len(BOMBS)


def test_any_of_several_ground_truths_is_right(tmp_path):
    row = {"question": "?", "ground_truth": ["x=3", "\\boxed{\\frac{1}{2}}"]}
    task = task_of(tmp_path / "rows.jsonl", row, held_out=0.0, seconds=20)
    (problem,) = task.problems("train", 1)
    verdicts = [task.is_correct(f"\\boxed{{{a}}}", problem) for a in ("0.5", "3", "x=3", "4")]
    assert verdicts == [True, True, True, False]


def test_a_response_is_the_demonstration_of_its_kind(tmp_path):
    rows = [
        {"question": "a", "ground_truth": "1", "response": "<Parallel>"},
        {"question": "b", "ground_truth": "1", "response": "plain"},
        {"question": "c", "ground_truth": "1"},
    ]
    task = task_of(tmp_path / "rows.jsonl", *rows, held_out=0.0)
    shown = [
        (task.demonstration(problem, parallel=True), task.demonstration(problem, parallel=False))
        for problem in task.problems("train", None)
    ]
    assert shown == [("<Parallel>", None), (None, "plain"), (None, None)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "Q"}, "no field 'reward_model.ground_truth', or it is empty; add the right"),
        ({"question": "Q", "ground_truth": " "}, "no field 'reward_model.ground_truth', or it is"),
        ({"ground_truth": "4"}, "no field 'question' or 'prompt' (found: ground_truth); add it"),
        ({"question": "Q", "reward_model": {}}, "no field 'reward_model.ground_truth'"),
    ],
)
def test_a_row_that_cannot_be_asked_or_graded_is_named_by_line_and_field(tmp_path, row, message):
    path = tmp_path / "rows.jsonl"
    with pytest.raises(DataError) as error:
        task_of(path, {"question": "Q", "ground_truth": "4"}, row)
    assert str(error.value).startswith(f"{path}:2: ") and message in str(error.value)


def test_a_split_without_problems_is_refused(tmp_path):
    task = task_of(tmp_path / "rows.jsonl", {"question": "Q", "ground_truth": "4"}, held_out=0.0)
    for n in (None, 1):
        with pytest.raises(ValueError, match=r"0 problems for validation.*held_out"):
            task.problems("validation", n)


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ValueError, match=r"'math-verify'.*threadweaver\[tasks\]"):
        task_of(tmp_path / "rows.jsonl", {"question": "Q", "ground_truth": "4"})


@pytest.mark.parametrize("box", ["42", "0042", " 42 ", "43", "4,2", "41+1", "-42", ""])
def test_whole_numbers_are_graded_as_in_multiplication_without_math_verify(
    tmp_path, monkeypatch, box
):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    row = {"question": "6*7=?\n", "ground_truth": "42"}
    task = task_of(tmp_path / "rows.jsonl", row, held_out=1.0, whole_numbers=True)
    (problem,) = task.problems("validation", None)
    response = f"<think>\n</think>\n\\boxed{{{box}}}"
    assert task.is_correct(response, problem) == Multiplication().is_correct(response, problem)
    assert task.is_correct(response, problem) == (box.strip().lstrip("0") == "42")


GSM8K = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n48 + 24 = <<48+24=72>>72.\n#### 72"


@pytest.mark.parametrize("whole_numbers", [True, False])
def test_a_solution_with_its_answer_after_four_signs_is_a_ground_truth(tmp_path, whole_numbers):
    rows = [{"question": f"{i}?", "answer": truth} for i, truth in enumerate((GSM8K, "#### 1,234"))]
    path, options = tmp_path / "rows.jsonl", {"whole_numbers": whole_numbers}
    task = task_of(path, *rows, held_out=0.0, seconds=20, **options)
    problems = task.problems("train", None)
    for number, right in (("72", (True, False)), ("1234", (False, True))):
        response = f"</think>\\boxed{{{number}}}"
        assert tuple(task.is_correct(response, problem) for problem in problems) == right
    assert len(task.notes) == 1


def test_ground_truths_that_no_answer_can_equal_are_counted(tmp_path):
    solution = "She sold 24.\nSo it is 72."
    truths = ["72", solution, "word " * 50, ["72", solution], GSM8K]
    rows = [{"question": f"{i}?", "answer": truth} for i, truth in enumerate(truths)]
    *_, note = task_of(tmp_path / "rows.jsonl", *rows, held_out=0.0).notes
    assert "3 of 5 right answers are several lines or over 200 characters" in note


@pytest.mark.parametrize(
    ("truth", "number"), [(72.0, "72"), ("1,234", "1234"), (["7", "7.00", 8], ("7", "8"))]
)
def test_whole_numbers_are_digits_however_a_file_writes_them(tmp_path, truth, number):
    row = {"question": "?", "answer": truth}
    task = task_of(tmp_path / "rows.jsonl", row, held_out=0.0, whole_numbers=True)
    assert task.problems("train", 1)[0].answer == number


@pytest.mark.parametrize("truth", [-5, 7.5, "seven", "1,23", "\\frac{4}{2}"])
def test_what_is_no_whole_number_is_refused_where_whole_numbers_are_graded(tmp_path, truth):
    rows = [{"question": "?", "answer": 4}, {"question": "?!", "answer": truth}]
    with pytest.raises(DataError, match=r"rows\.jsonl:2: .*no whole number from 0 on"):
        task_of(tmp_path / "rows.jsonl", *rows, held_out=0.0, whole_numbers=True)


def test_any_answer_of_a_list_is_right(tmp_path):
    rows = [{"question": f"{i}?", "answer": ["4", 6, "4"]} for i in range(2)]
    path = tmp_path / "rows.jsonl"
    task = task_of(path, *rows, held_out=0.0, whole_numbers=True)
    (problem, _) = task.problems("train", None)
    assert problem.answer == ("4", "6")
    grades = [task.is_correct(f"</think>\\boxed{{{n}}}", problem) for n in (4, 5, 6)]
    assert grades == [True, False, True]
    # A list is kept as one: self-training writes what it rolled out to a file like this.
    save_rows([trajectory_row("Q", "R", problem.answer)], path)
    (example,) = load_examples(path)
    assert example.ground_truth == ("4", "6")


def test_what_a_held_out_share_takes_away_is_said(tmp_path):
    rows = [{"question": f"{i}?", "answer": 4} for i in range(40)]
    task = task_of(tmp_path / "rows.jsonl", *rows, held_out=0.5, whole_numbers=True)
    held = len(task.problems("validation", None))
    assert 0 < held < 40
    columns, share = task.notes
    assert columns.endswith("rows.jsonl: 40 rows: prompt from question, answer from answer")
    assert f"held_out 0.5 keeps {held} of 40 rows for validation, out of training" in share
    for none in (0.0, 1.0):
        task = task_of(tmp_path / "rows.jsonl", *rows, held_out=none, whole_numbers=True)
        assert len(task.notes) == 1


def test_a_question_is_in_one_split_however_it_is_written(tmp_path):
    rows = [{"question": f"{i}?", "answer": 4} for i in range(20)]
    rows += [{"prompt": [{"role": "user", "content": f"{i}?"}], "answer": 4} for i in range(20)]
    task = task_of(tmp_path / "rows.jsonl", *rows, held_out=0.5, whole_numbers=True)
    for split in ("train", "validation"):
        prompts = [problem.prompt for problem in task.problems(split, None)]
        texts = sorted(p for p in prompts if isinstance(p, str))
        assert texts == sorted(p[0]["content"] for p in prompts if not isinstance(p, str))
