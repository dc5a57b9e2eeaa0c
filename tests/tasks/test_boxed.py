import pytest
from hypothesis import given
from hypothesis import strategies as st

from threadweaver.tasks.boxed import boxed_answer

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
