"""Where the reasoning of a response is, and its lines."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from threadweaver.annotate.failures import LeftOut
from threadweaver.annotate.lines import numbered, split, split_lines


@pytest.mark.parametrize(
    ("response", "before", "lines", "after"),
    [
        ("<think>\na\n\nb</think>\nx", "<think>\n", ["a\n\n", "b"], "</think>\nx"),
        ("a\nb\n</think>\n\\boxed{1}", "", ["a\n", "b\n"], "</think>\n\\boxed{1}"),
        ("a\nb\n\nSo \\boxed{1} is it.", "", ["a\n", "b\n\n"], "So \\boxed{1} is it."),
        ("a\n\\boxed{0}\n\nb\n \nSo\n\\boxed{1}", "", ["a\n", "\\boxed{0}\n\n", "b\n \n"],
         "So\n\\boxed{1}"),
    ],
)  # fmt: skip
def test_the_reasoning_and_its_lines(response, before, lines, after):
    found = split(response)
    assert (found.before, found.lines, found.after) == (before, lines, after)
    assert numbered(["a\n\n", "b"]) == "1: a\n2: b"


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("<think>\na\nb\n\\boxed{1}", "never closed"),
        ("<think>\na\n</think>\\boxed{1}", "a single line"),
        ("<think> </think>\\boxed{1}", "no reasoning"),
        ("a\nb\n\\boxed{1}", "no reasoning"),
        ("", "no reasoning"),
        ("<think>a\n<think>b\n</think>", "twice"),
        ("<think>a\nb</think>c\n</think>", "twice"),
        ("<think>a\n<Thread>\nb</think>", "tags of the format"),
    ],
)
def test_a_response_without_lines_to_work_on_is_left_out(response, reason):
    with pytest.raises(LeftOut, match=reason) as caught:
        split(response)
    assert caught.value.step == "0-answer"


@given(st.text(alphabet="a \n\t\u2028"))
def test_lines_put_together_are_the_text(text):
    lines = split_lines(text)
    assert "".join(lines) == text
    assert all(line.strip() for line in lines[1:])
