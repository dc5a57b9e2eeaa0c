"""Benchmarks by name: rows as their public copies have them are asked and graded."""

from __future__ import annotations

import functools
import json
import sys

import pytest

from threadweaver.grading.judge import Judge
from threadweaver.tasks import GradesInBackground, load_task

pytest.importorskip("math_verify")
SHARED = functools.cache(Judge)  # one server of each kind for all tests: it takes seconds to start


@pytest.fixture(autouse=True)
def shared_judges(monkeypatch):
    monkeypatch.setattr("threadweaver.tasks.benchmarks.Judge", SHARED)


# One row of each layout: the columns of the copy that the name says, the content made up.
LAYOUTS = {
    "aime24 HuggingFaceH4": {
        "id": 60,
        "problem": "What is 200 + 4?",
        "solution": "We add.\nSo it is $\\boxed{204}$.",
        "answer": "204",
        "url": "https://example.org/1",
        "year": "2024",
    },
    "aime24 math-ai": {
        "id": 60,
        "problem": "What is 200 + 4?",
        "solution": "\\boxed{204}",
        "url": "https://example.org/1",
    },
    "aime24 Maxwell-Jia": {
        "ID": "2024-I-4",
        "Problem": "What is 200 + 4?",
        "Solution": "We add.",
        "Answer": 204,
    },
    "aime25 math-ai": {"problem": "What is 60 + 10?", "answer": "70", "id": "0"},
    "aime25 opencompass": {"question": "What is 60 + 10?", "answer": "70"},
    "aime25 MathArena": {
        "problem_idx": 1,
        "problem": "What is 60 + 10?",
        "answer": 70,
        "problem_type": ["Number Theory"],
    },
    "amc23 math-ai": {
        "id": 0,
        "question": "What is 20 + 7?",
        "answer": 27.0,
        "url": "https://example.org/2",
    },
    "math500 HuggingFaceH4": {
        "problem": "Convert $(0,3)$ to polar coordinates.",
        "solution": "It is $\\boxed{\\left( 3, \\frac{\\pi}{2} \\right)}.$",
        "answer": "\\left( 3, \\frac{\\pi}{2} \\right)",
        "subject": "Precalculus",
        "level": 2,
        "unique_id": "test/precalculus/807.json",
    },
    "minerva math-ai": {"question": "What is the speed?", "answer": "4.5e33"},
    "minerva solutions": {
        "problem": "What is the speed?",
        "solution": "We multiply: \\boxed{4.5e33} erg/s.",
        "type": "Introduction to Astronomy",
        "idx": 0,
    },
    "olympiadbench Hothan": {
        "id": 1606,
        "question": "Find all roots.",
        "solution": ["There are two."],
        "final_answer": ["$1$, $-1$"],
        "context": None,
        "image_1": None,
        "modality": "Text-only",
        "is_multiple_answer": True,
        "unit": None,
        "answer_type": "Numerical",
        "error": None,
        "language": "English",
    },
}
ANSWERS = {
    "aime24": ("204", "205"),
    "aime25": ("070", "7"),
    "amc23": ("27", "28"),
    "math500": ("(3, \\pi/2)", "(\\pi/2, 3)"),
    "minerva": ("4.5 \\times 10^{33}", "4.5 \\times 10^{32}"),
    "olympiadbench": ("-1, 1", "1"),
}


def save(path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_of_each_public_layout_is_asked_and_graded(tmp_path, layout):
    name = layout.split()[0]
    row = LAYOUTS[layout]
    task = load_task(name, path=save(tmp_path / "rows.jsonl", row))
    [problem] = task.problems("validation", None)
    asked = {key.lower(): value for key, value in row.items()}
    assert problem.prompt == asked.get("problem", asked.get("question"))
    right, wrong = ANSWERS[name]
    assert isinstance(task, GradesInBackground)
    assert task.is_correct(f"<think>\n</think>\n\\boxed{{{right}}}", problem)
    assert task.is_correct(f"So it is $\\boxed{{{right}}}$.", problem)  # a model that thinks aloud
    assert not task.is_correct(f"\\boxed{{{wrong}}}", problem)
    assert not task.is_correct(f"The answer is {right}.", problem)
    assert getattr(task, "samples") == (32 if name in ("aime24", "aime25", "amc23") else 4)  # noqa: B009
    assert "1 problems, and its public copies have" in " ".join(getattr(task, "notes"))  # noqa: B009


def test_numbers_may_differ_by_the_error_that_olympiadbench_gives(tmp_path):
    row = LAYOUTS["olympiadbench Hothan"] | {"is_multiple_answer": False, "context": "A boat."}
    rows = [
        row | {"final_answer": ["0.61"], "error": "1e-2", "unit": "N"},
        row | {"final_answer": ["$7 \\times 10^{35}$, 0.002"], "error": "1e34,1e-3"},
        row | {"final_answer": ["1", "2"], "is_multiple_answer": True},
    ]
    task = load_task("olympiadbench", path=save(tmp_path / "rows.jsonl", *rows))
    one, two, all_of_them = task.problems("validation", None)
    assert one.prompt == "A boat.\nFind all roots."

    def verdicts(problem, *answers):
        return [task.is_correct(f"\\boxed{{{answer}}}", problem) for answer in answers]

    assert verdicts(one, "0.62", "\\frac{3}{5}", "0.64", "0.61, 0.62") == [True, True, False, False]
    assert verdicts(two, "0.001, 7.1 \\cdot 10^{35}", "0.001, 7.2 \\cdot 10^{35}") == [True, False]
    assert verdicts(all_of_them, "2, 1", "1") == [True, False]


def test_a_data_set_of_the_hub_is_loaded_by_its_name(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(path, config):
        asked.append((path, config))
        if path == "no/such":
            raise ConnectionError("cannot reach the hub\nmore lines")
        rows = [LAYOUTS["aime25 math-ai"]]
        return {"train": rows * 2, "test": rows} if config else {"validation": rows}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    [problem] = load_task("aime25", path="math-ai/aime25").problems("validation", None)
    assert problem.source == "math-ai/aime25, row 1"
    for options, count in (({}, 1), ({"split": "train"}, 2)):
        task = load_task("aime25", path="math-ai/aime25", config="x", **options)
        assert len(task.problems("validation", None)) == count
    assert asked == [("math-ai/aime25", None)] + [("math-ai/aime25", "x")] * 2
    with pytest.raises(ValueError, match="no split 'dev'; option 'split': one of train, test"):
        load_task("aime25", path="math-ai/aime25", config="x", split="dev")
    with pytest.raises(ValueError, match=r"^no/such: no such file, and no data set .*the hub$"):
        load_task("aime25", path="no/such")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="need the package 'datasets'"):
        load_task("aime25", path="math-ai/aime25")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("aime24 HuggingFaceH4", {"answer": "1000"}, "'1000', and those of aime24 are whole"),
        ("aime24 HuggingFaceH4", {"answer": "x+1"}, "is this the right file"),
        ("aime24 HuggingFaceH4", {"answer": None, "solution": None}, "add the right answer"),
        ("aime24 HuggingFaceH4", {"problem": None}, "no field 'question' or 'prompt'"),
        ("math500 HuggingFaceH4", {"problem": 3}, "field 'problem' must be text"),
        ("olympiadbench Hothan", {"final_answer": None}, "proofs"),
        ("olympiadbench Hothan", {"image_1": {"bytes": "x"}}, "'image_1' holds an image"),
        ("olympiadbench Hothan", {"error": "some"}, "field 'error' is 'some'"),
        ("olympiadbench Hothan", {"error": "-1"}, "field 'error' is '-1'"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path, name, change, message):
    path = save(tmp_path / "rows.jsonl", LAYOUTS[name], LAYOUTS[name] | change)
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: ") as error:
        load_task(name.split()[0], path=path)
    assert message in str(error.value)


def test_what_a_benchmark_is_not_for_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"aime24: give its path, since no benchmark is shipped"):
        load_task("aime24")
    path = save(tmp_path / "rows.jsonl", LAYOUTS["aime24 math-ai"])
    with pytest.raises(ValueError, match="no problems to train on"):
        load_task("aime24", path=path).problems("train", 1)
    with pytest.raises(ValueError, match="aime24: 1 problems, not 2; ask for fewer"):
        load_task("aime24", path=path).problems("validation", 2)
    with pytest.raises(ValueError, match="option 'split' is for names on the hub"):
        load_task("aime24", path=path, split="test")
    with pytest.raises(ValueError, match="did you mean 'math500'"):
        load_task("math50")
