"""What holds for every task, whatever it is."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from threadweaver.tasks import Task, load_task
from threadweaver.tasks.task import is_held_out
from threadweaver.trajectory import check_format

PARALLEL = (
    "<think>\n<Parallel>\n<Outlines>\n<Outline>1: a</Outline>\n</Outlines>\n<Thread>\n1: b</Thread>"
    "\n</Parallel>\n</think>\n\\boxed{4}"
)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> dict[str, Task]:
    path = tmp_path_factory.mktemp("task") / "problems.jsonl"
    rows = [{"question": f"{i}?", "response": PARALLEL, "ground_truth": 4} for i in range(90)]
    # Some questions twice: both copies belong to one split.
    path.write_text("".join(json.dumps(row) + "\n" for row in rows + rows[:30]))
    return {
        "multiplication": load_task("multiplication", validation=60),
        "reasoning_gym": load_task("reasoning_gym:chain_sum", max_terms=2, max_digits=2),
        "file": load_task(str(path), held_out=0.5),
    }


names = st.sampled_from(["multiplication", "reasoning_gym", "file"])


@given(name=names, sizes=st.tuples(st.integers(0, 30), st.integers(0, 30)), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_no_question_is_in_both_splits_whatever_is_asked_for(tasks, name, sizes, seed):
    train = tasks[name].problems("train", sizes[0], seed)
    validation = tasks[name].problems("validation", sizes[1], seed + 1)
    assert (len(train), len(validation)) == sizes
    assert not {p.prompt for p in train} & {p.prompt for p in validation}


@pytest.mark.parametrize("name", ["multiplication", "reasoning_gym", "file"])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_seed_decides_the_problems(tasks, name, split):
    task = tasks[name]
    first = task.problems(split, 20, seed=1)
    assert task.problems(split, 20, seed=1) == first
    assert task.problems(split, 20, seed=2) != first


def test_more_problems_are_the_same_and_others():
    for name in ("multiplication", "reasoning_gym:chain_sum"):
        task = load_task(name)
        assert task.problems("train", 30)[:10] == task.problems("train", 10)


@pytest.mark.parametrize("name", ["multiplication", "file"])
def test_demonstrations_are_right_and_well_formed(tasks, name):
    task = tasks[name]
    for problem in task.problems("train", 5):
        text = task.demonstration(problem, parallel=True)
        assert text is not None and check_format(text, require_parallel=True) == []
        assert task.is_correct(text, problem)
        assert not task.is_correct(text.replace("boxed{", "boxed{7"), problem)
        sequential = task.demonstration(problem, parallel=False)
        assert sequential is None or "<Parallel>" not in sequential
    assert task.ungraded == 0


@pytest.mark.parametrize("name", ["multiplication", "reasoning_gym", "file"])
@pytest.mark.parametrize(
    "response", ["", "4", "<think>\\boxed{4}", "</think>4", "</think>\\boxed{"]
)
def test_a_response_without_an_answer_is_wrong(tasks, name, response):
    (problem,) = tasks[name].problems("validation", 1)
    assert tasks[name].is_correct(response, problem) is False


@given(text=st.text(max_size=20), share=st.floats(0, 1))
def test_a_question_is_held_out_by_its_text_alone(text, share):
    assert is_held_out(text, 1.0) and not is_held_out(text, 0.0)
    assert is_held_out(text, share) <= is_held_out(text, (1 + share) / 2)


def test_the_share_of_held_out_questions_is_as_asked():
    assert sum(is_held_out(str(i), 0.25) for i in range(4000)) == pytest.approx(1000, abs=100)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("multiplicaton", {}, "no task 'multiplicaton' (did you mean 'multiplication'?): there"),
        ("reasoning_gym:chainsum", {}, "did you mean 'reasoning_gym:chain_sum'?"),
        ("quux", {}, "no task 'quux': there are multiplication, reasoning_gym:<dataset>, aime24"),
        ("multiplication", {"digit": 3}, "has no option 'digit'; it has digits, factors, valid"),
        (
            "multiplication",
            {"digits": "two"},
            "multiplication: option 'digits' is 'two': it must be of type int",
        ),
        ("multiplication", {"seed": True}, "option 'seed'"),
        ("no.jsonl", {"held_out": {"a": 1}}, "option 'held_out'"),
        ("multiplication", {"digits": 1}, "train=0 and validation=500 ask for more problems than"),
        ("reasoning_gym:chain_sum", {"max_term": 3}, "no option 'max_term'; it has allow_neg"),
        ("reasoning_gym:chain_sum", {"max_terms": 1}, "chain_sum: max_terms must be >= min"),
        ("reasoning_gym:chain_sum", {"max_terms": "many"}, "reasoning_gym:chain_sum: "),
        ("reasoning_gym:chain_sum", {"held_out": 2}, "held_out is 2: it must be a share"),
        ("reasoning_gym:chain_sum", {"seconds": 0}, "seconds is 0: it must be above 0"),
        ("none.jsonl", {}, "none.jsonl: no such file"),
        ("none.jsonl", {"heldout": 1}, "has no option 'heldout'; it has held_out, seconds"),
    ],
)
def test_a_task_that_cannot_be_had_is_refused_in_one_line(name, options, message):
    with pytest.raises(ValueError) as error:
        load_task(name, **options)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["multiplication", "reasoning_gym", "file"])
def test_problems_that_do_not_exist_are_refused(tasks, name):
    with pytest.raises(ValueError, match="cannot make -1 problems"):
        tasks[name].problems("train", -1)
    if name != "reasoning_gym":
        with pytest.raises(ValueError, match="validation"):
            tasks[name].problems("validation", 10_000)
    if name != "file":
        with pytest.raises(ValueError, match="say how many"):
            tasks[name].problems("train", None)
