import hashlib
import itertools
import json
import math
import re
import subprocess
import sys
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from threadweaver.data import load_examples
from threadweaver.model import build_tokenizer
from threadweaver.tasks.boxed import boxes_number
from threadweaver.tasks.multiplication import (
    Multiplication,
    make_rows,
    place_name,
    question,
    split_problems,
    trajectory,
)
from threadweaver.trajectory import Codec, check_format, path_lengths

TOKENIZER = build_tokenizer()
CODEC = Codec.from_tokenizer(TOKENIZER)
problems = st.lists(st.integers(1, 10**5), min_size=2, max_size=4).map(tuple)

OUTLINE = re.compile(r"<Outline>(\d+): times (\d)</Outline>")
COLUMN = re.compile(r"(\d)\*(\d)=(\d\d), (\d\d)\+(\d)=(\d\d), carry (\d), (\S+) (\d) so (\d+)")
ADDITION = re.compile(r"(\S+) (\d)\+(\d)\+(\d) so (\d+)")
MARKUP = re.compile(
    r"</?(Parallel|Outlines)>\n|<Outline>.*</Outline>\n|<Thread>\n\d+: |(?<=</Thread>)\n"
)


def as_sequential(text: str) -> str:
    return MARKUP.sub("", text).replace("</Thread>", "\n")


def recompute(text: str, factors: tuple[int, ...]) -> int:
    """Work through a sequential text line by line, checking every number; the boxed answer.

    Knows the layout but none of the generator's code: digits are collected by place *name*.
    """
    place_of = {place_name(i): i for i in range(40)}
    lines = iter(text.split("\n"))
    assert next(lines) == "<think>"
    product = str(factors[0])
    line = next(lines)
    for i, factor in enumerate(factors[1:]):
        if i > 0:
            assert line == f"{product}*{factor}"
            line = next(lines)
        partials: list[dict[int, int]] = []
        for shift, digit in enumerate(reversed(str(factor))):
            assert line == f"0{product}*{digit}"
            carry, partial, so = 0, {}, ""
            for k, top in enumerate(reversed(f"0{product}")):
                match = COLUMN.fullmatch(line := next(lines))
                assert match, line
                a, b, ab, again, c, with_carry, carried, name, result, so = match.groups()
                assert (a, b) == (top, digit)
                assert int(ab) == int(a) * int(b)
                assert again == ab and int(c) == carry
                assert int(with_carry) == int(ab) + carry
                assert carried + result == with_carry
                assert place_of[name] == shift + k
                carry, partial[shift + k] = int(carried), int(result)
                low_digits = int(product) % 10 ** (k + 1)
                assert len(so) == k + 2 and int(so) == low_digits * int(digit)
            assert sum(d * 10**p for p, d in partial.items()) == int(so) * 10**shift
            partials.append(partial)
            line = next(lines)
        total = partials[0]
        for shift, partial in enumerate(partials[1:], start=1):
            before, carry = defaultdict(int, total), 0
            known = "".join(str(before[place]) for place in reversed(range(shift)))
            assert line == f"{place_name(shift - 1)} {known}"
            for place in range(shift, max(partial) + 1):
                match = ADDITION.fullmatch(line := next(lines))
                assert match, line
                name, a, b, c, so = match.groups()
                assert place_of[name] == place
                assert (int(a), int(b), int(c)) == (before[place], partial[place], carry)
                assert so[2:] == known
                assert int(so[:2]) == int(a) + int(b) + int(c)
                carry, total[place], known = int(so[0]), int(so[1]), so[1:]
            assert carry == 0
            line = next(lines)
        product = "".join(str(total[p]) for p in sorted(total, reverse=True))
        assert int(product) == math.prod(factors[: i + 2])
    assert line == "</think>"
    match = re.fullmatch(r"\\boxed\{(\d+)\}", next(lines))
    assert match and list(lines) == []
    return int(match[1])


@given(factors=problems)
def test_every_step_of_the_text_is_right(factors):
    assert recompute(trajectory(factors, parallel=False), factors) == math.prod(factors)


def test_the_check_of_steps_catches_one_wrong_digit_anywhere():
    factors = (47, 86, 23)
    text = trajectory(factors, parallel=False)
    for i in (i for i, character in enumerate(text) if character.isdecimal()):
        wrong = f"{text[:i]}{(int(text[i]) + 1) % 10}{text[i + 1 :]}"
        try:
            assert recompute(wrong, factors) == math.prod(factors)
        except AssertionError:
            continue
        pytest.fail(f"not noticed: {wrong!r}")


@given(factors=problems)
def test_parallel_and_sequential_hold_the_same_steps(factors):
    text = trajectory(factors, parallel=True)
    assert as_sequential(text) == trajectory(factors, parallel=False)
    assert not re.search(r"Parallel|Outline|Thread", trajectory(factors, parallel=False))


@given(factors=problems)
def test_parallel_is_well_formed_with_a_block_a_factor_and_a_thread_a_digit(factors):
    text = trajectory(factors, parallel=True)
    assert check_format(text, require_parallel=True) == []
    blocks = re.findall(r"<Parallel>.*?</Parallel>", text, re.S)
    for block, factor in zip(blocks, factors[1:], strict=True):
        digits = reversed(str(factor))
        assert OUTLINE.findall(block) == [(str(n), d) for n, d in enumerate(digits, 1)]


@given(factors=problems)
def test_both_trajectories_give_the_right_answer(factors):
    for parallel in (True, False):
        text = trajectory(factors, parallel)
        assert boxes_number(text, str(math.prod(factors)))
        assert not boxes_number(text, str(math.prod(factors) + 1))


@given(factors=problems)
def test_a_thread_has_three_times_the_tokens_of_its_outline(factors):
    text = trajectory(factors, parallel=True)
    outlines = re.findall(r"<Outline>(.*?)</Outline>", text)
    threads = re.findall(r"<Thread>(.*?)</Thread>", text, re.S)
    for outline, thread in zip(outlines, threads, strict=True):
        assert len(TOKENIZER.encode(thread)) >= 3 * len(TOKENIZER.encode(outline))


@pytest.mark.parametrize(
    ("factors", "over_total", "over_sequential"),
    [((47, 86), 1.5, 1.3), ((10, 10), 1.5, 1.3), ((99, 99), 1.5, 1.3), ((123, 456), 1.8, 1.6),
     ((47, 86, 23), 1.5, 1.35)],
)  # fmt: skip
def test_parallelism_pays(factors, over_total, over_sequential):
    ids = [*TOKENIZER.encode(trajectory(factors, parallel=True)), TOKENIZER.eos_token_id]
    lengths = path_lengths(ids, CODEC)
    sequential = len(TOKENIZER.encode(trajectory(factors, parallel=False))) + 1
    assert lengths.total_tokens == len(ids)
    assert lengths.blocks == len(factors) - 1
    assert lengths.total_tokens / lengths.longest_path_tokens >= over_total
    assert sequential / lengths.longest_path_tokens >= over_sequential


def test_problems_of_one_size_have_one_layout():
    def layout(factors):
        return re.sub(r"\d", "0", trajectory(factors, parallel=True).rpartition("</think>")[0])

    assert len({layout(factors) for factors in [(10, 10), (47, 86), (99, 99)]}) == 1


def test_place_names_go_on_without_end():
    assert [place_name(i) for i in (0, 9, 10, 31)] == ["ones", "billions", "10^10", "10^31"]


@pytest.mark.parametrize(
    ("factors", "message"),
    [((7,), "two or more"), ((7, 0), "at least 1"), ((7, 10**50), "at most 50 digits")],
)
def test_bad_factors_are_refused(factors, message):
    with pytest.raises(ValueError, match=message):
        trajectory(factors, parallel=True)


def test_a_factor_may_have_as_many_digits_as_a_block_may_hold_threads():
    factors = (7, 10**50 - 1)
    assert check_format(trajectory(factors, parallel=True), require_parallel=True) == []
    assert boxes_number(trajectory(factors, parallel=False), str(math.prod(factors)))


def test_the_seed_alone_decides_the_problems():
    train, validation = split_problems(1000, 100, seed=7)
    assert (train, validation) == split_problems(1000, 100, seed=7)
    assert train != split_problems(1000, 100, seed=8)[0]
    digest = hashlib.sha256(repr((train, validation)).encode()).hexdigest()
    assert digest[:16] == "874f914ed420bfd0"


@given(
    digits=st.integers(1, 3),
    factors=st.integers(2, 4),
    validation=st.integers(0, 8),
    seed=st.integers(0, 10),
)
def test_no_question_is_in_both_halves_in_any_order(digits, factors, validation, seed):
    train, held_out = split_problems(20, validation, digits, factors, seed)
    assert (len(train), len(held_out)) == (20, validation)
    assert len(set(train)) == 20
    asked = {tuple(sorted(problem)) for problem in held_out}
    assert len(asked) == validation
    assert not asked & {tuple(sorted(problem)) for problem in train}
    for factor in itertools.chain.from_iterable(train + held_out):
        assert len(str(factor)) == digits and factor > 0
    assert {len(problem) for problem in train + held_out} == {factors}


def test_every_problem_that_exists_can_be_asked_and_no_more():
    train, _ = split_problems(81, 0, digits=1)
    assert sorted(train) == [(a, b) for a in range(1, 10) for b in range(1, 10)]
    _, validation = split_problems(0, 45, digits=1)
    assert len({tuple(sorted(p)) for p in validation}) == 45
    for train_size, validation_size in ((82, 0), (0, 46), (81, 1)):
        with pytest.raises(ValueError, match="more problems than exist: digits=1, factors=2"):
            split_problems(train_size, validation_size, digits=1)


def test_huge_spaces_are_sampled_without_counting_them_out():
    train, _ = split_problems(50, 5, digits=50, factors=9)
    assert len(set(train)) == 50


@pytest.mark.parametrize(
    "arguments",
    [{"train": -1}, {"validation": -1}, {"digits": 0}, {"digits": 51}, {"factors": 1}],
)
def test_a_size_out_of_range_is_named(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=name):
        split_problems(**{"train": 1, "validation": 1, **arguments})


@given(share=st.floats(0, 1), count=st.integers(0, 30), seed=st.integers(0, 5))
@settings(max_examples=30)
def test_the_parallel_share_is_exact_and_leaves_the_problems_alone(share, count, seed):
    train, _ = split_problems(count, 0, seed=seed)
    rows = list(make_rows(train, share, seed))
    assert sum("<Parallel>" in row["response"] for row in rows) == round(share * count)
    assert [row["question"] for row in rows] == [question(problem) for problem in train]
    assert rows == list(make_rows(train, share, seed))


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_a_share_outside_0_to_1_is_refused(share):
    with pytest.raises(ValueError, match="parallel_share"):
        list(make_rows([(2, 3)], share, 0))


def test_a_row_holds_prompt_response_and_answer():
    (row,) = make_rows([(47, 86)], 1.0, 0)
    assert row["question"] == "47*86=?\n"
    assert row["qwen_text"] == row["question"] + row["response"]
    assert row["reward_model"] == {"ground_truth": "4042", "style": "rule"}


def test_the_task_holds_out_what_the_files_of_the_same_numbers_hold_out():
    files = split_problems(100, 60, digits=2, factors=3, seed=4)
    task = Multiplication(digits=2, factors=3, validation=60, seed=4)
    validation = {p.data for p in task.problems("validation", 60)}
    assert validation == set(files[1])
    assert {str(p.prompt) for p in task.problems("train", 2000)}.isdisjoint(
        map(question, validation)
    )


def test_the_task_asks_every_problem_there_is_once():
    task = Multiplication(digits=1, validation=5)
    asked = {p.data for p in task.problems("validation", 5)}
    free = [(a, b) for a in range(1, 10) for b in range(1, 10) if not {(a, b), (b, a)} & asked]
    assert sorted(p.data for p in task.problems("train", len(free))) == free
    with pytest.raises(ValueError, match=rf"has {len(free)} train problems, not {len(free) + 1}"):
        task.problems("train", len(free) + 1)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "threadweaver.tasks", "multiplication", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_command_writes_both_halves(tmp_path):
    sizes = ["--train", "30", "--validation", "10", "--parallel-share", "0.5", "--seed", "3"]
    done = command("--out", str(tmp_path), *sizes)
    assert done.returncode == 0, done.stderr
    for name, problems in zip(("train", "validation"), split_problems(30, 10, seed=3), strict=True):
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == list(make_rows(problems, 0.5, 3))
        assert len(load_examples(tmp_path / f"{name}.jsonl")) == len(problems)


def test_the_command_refuses_too_many_problems_in_one_line(tmp_path):
    done = command("--out", str(tmp_path), "--train", "9999")
    assert done.returncode == 2
    assert done.stderr.startswith("error: train=9999") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_command_refuses_an_unknown_argument(tmp_path):
    done = command("--out", str(tmp_path), "--digit", "x")
    assert done.returncode == 2 and "digit" in done.stderr
