import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from threadweaver.tasks.boxed import boxed_answer, boxes_number, stated_answer

balanced = st.recursive(
    st.text("ab\\{} \n").map(lambda s: s.replace("\\", "").replace("{", "").replace("}", "")),
    lambda inner: st.lists(inner.map(lambda s: f"{{{s}}}") | st.just("x"), max_size=3).map("".join),
)


@given(thinking=st.text("ab\\boxed{}", max_size=20), content=balanced, after=st.text("ab}\n"))
def test_the_last_box_after_the_thinking_is_the_answer(thinking, content, after):
    response = f"{thinking}</think>\\boxed{{no}} \\boxed{{{content}}}{after}"
    assert boxed_answer(response) == content.strip()


@pytest.mark.parametrize(
    ("answer", "boxed"),
    [
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{a\\\\}", "a\\\\"),
        ("\\boxed{\\boxed{5}}", "5"),
        ("\\boxed{}", ""),
        ("\\boxed{1} and \\boxed{2", None),
        ("\\boxed{\\}", None),
        ("1", None),
    ],
)
def test_braces_are_matched(answer, boxed):
    assert boxed_answer(f"</think>{answer}") == boxed


def test_a_response_that_never_stops_thinking_has_no_answer():
    assert boxed_answer("<think> \\boxed{4}") is None
    assert boxed_answer("\\boxed{4}</think>") is None


@pytest.mark.parametrize(
    ("response", "boxed"),
    [
        ("It is \\boxed{4}.", "4"),
        ("\\boxed{3}, no: \\boxed{4}", "4"),
        ("\\boxed{3}</think>\\boxed{4}", "4"),
        ("\\boxed{4}</think>", None),
        ("\\fbox{4}", "4"),
        ("\\boxed 4", "4"),
        ("$\\boxed4$", "4"),
        ("$\\boxed \\pi$", "\\pi"),
        ("\\boxed{3} \\fbox {4}", "4"),
        ("\\boxed{\\frac{1}{2}}\\boxedtext{3}", "\\frac{1}{2}"),
        ("\\boxed", None),
        ("\\boxed }", None),
        ("four", None),
    ],
)
def test_a_model_that_does_not_think_has_its_answer_anywhere(response, boxed):
    assert boxed_answer(response) == boxed


def test_the_answer_of_a_long_response_takes_linear_time():
    start = time.process_time()
    for part in ("\\boxed{", "\\boxed", "</think>", "{", "\\boxed ", "\\boxed{}", "<think>"):
        boxed_answer(part * 200_000)
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("<think>\n</think>\n\\boxed{42}", True),
        ("<think>\n</think>\n\\boxed{ 0042 } is it", True),
        ("</think> \\boxed{7}, no: \\boxed{42}", True),
        ("</think> \\boxed{42}, no: \\boxed{7}", False),
        ("</think> \\boxed{42}, no: \\boxed{", False),
        ("<think>\n\\boxed{42}\n</think>\nforty-two", False),
        ("<think>\n\\boxed{42}", False),
        ("</think> \\boxed{4 2}", False),
        ("</think> \\boxed{-42}", False),
        ("</think> \\boxed{\u0664\u0662}", False),
        ("</think> \\boxed{" + "9" * 5000 + "}", False),
        ("</think> 42", False),
        ("", False),
    ],
)
def test_a_whole_number_is_compared_by_its_digits(response, right):
    assert boxes_number(response, "42") is right


def test_zero_is_an_answer_like_any_other():
    assert boxes_number("</think>\\boxed{00}", "0") and not boxes_number("</think>\\boxed{}", "0")


@pytest.mark.parametrize(
    ("truth", "stated"),
    [
        ("72", "72"),
        ("She sold 24.\n#### 72", "72"),
        ("She sold 24.\n#### 1,072\n", "1,072"),
        ("####72", "72"),
        ("#### a heading\nof several lines", "#### a heading\nof several lines"),
        ("#### 5\n#### 7", "7"),
        ("so \\boxed{7}.\n#### 8", "7"),
        ("\\boxed{}\n#### 8", "8"),
        ("no ####", "no ####"),
        ("####", "####"),
    ],
)
def test_a_ground_truth_states_its_answer_in_a_box_or_after_four_signs(truth, stated):
    assert stated_answer(truth) == stated
