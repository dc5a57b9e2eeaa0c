import sys

import pytest

from threadweaver.tasks import load_task
from threadweaver.tasks.reasoning_gym import INSTRUCTION, dataset_names

# A number, a row of cells, a list that its scorer evaluates, a list of moves.
DATASETS = ["gcd", "arc_1d", "spiral_matrix", "tower_of_hanoi"]


@pytest.mark.parametrize("name", DATASETS)
def test_the_answer_on_record_is_right_and_another_is_not(name):
    task = load_task(f"reasoning_gym:{name}", seconds=20)
    for problem in task.problems("train", 3):
        assert str(problem.prompt).endswith(INSTRUCTION)
        assert task.is_correct(f"<think></think>\\boxed{{{problem.answer}}}", problem)
        assert not task.is_correct(f"<think></think>\\boxed{{not {problem.answer}}}", problem)
        assert task.demonstration(problem, parallel=True) is None
    assert task.ungraded == 0


def test_the_scorer_decides_not_the_text():
    task = load_task("reasoning_gym:countdown", seconds=20)
    for problem in task.problems("validation", 2):
        assert task.is_correct(f"</think>\\boxed{{0 + {problem.answer}}}", problem) is False
        assert task.is_correct(f"</think>\\boxed{{({problem.answer})}}", problem) is True


def test_an_answer_that_the_scorer_never_comes_back_from_is_wrong():
    task = load_task("reasoning_gym:spiral_matrix", seconds=1)
    (problem,) = task.problems("train", 1)
    assert not task.is_correct("</think>\\boxed{[9**9**9]}", problem)
    assert task.ungraded == 1


def test_questions_are_different_and_run_out():
    task = load_task("reasoning_gym:chain_sum", max_terms=2, max_digits=1, held_out=0.5)
    problems = task.problems("train", 90)
    assert len({str(problem.prompt) for problem in problems}) == 90
    with pytest.raises(ValueError, match=r"made only \d+ different train questions, not 400"):
        task.problems("train", 400)


def test_a_dataset_that_is_not_repeatable_needs_a_hash_seed(monkeypatch):
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.raises(ValueError, match="set the environment variable PYTHONHASHSEED=0"):
        load_task("reasoning_gym:ransom_note")
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    assert load_task("reasoning_gym:ransom_note").problems("train", 1)


def test_every_dataset_but_the_mixture_has_a_name():
    assert len(dataset_names()) > 90 and "composite" not in dataset_names()


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match=r"'reasoning-gym'.*threadweaver\[tasks\]"):
        load_task("reasoning_gym:gcd")
    with pytest.raises(ValueError, match="did you mean 'multiplication'"):
        load_task("multiplicatio")
