"""Step 4: outlines, and each rule with a reply that breaks it."""

from __future__ import annotations

import pytest

from threadweaver.annotate.failures import Breach
from threadweaver.annotate.outline import read_outlines

GOOD = """<Outlines>
<Outline>1: the product with 30</Outline>
<Outline>2: case 2, by hand</Outline>
</Outlines>"""
THREADS = ["12 times 30 is 360.", "The other is 4.5, so 4368."]
BEFORE = "We know 12 and 30."


def test_one_outline_a_thread_in_order():
    wanted = ["the product with 30", "case 2, by hand"]
    assert read_outlines(GOOD, THREADS, BEFORE) == wanted
    fenced = f"```\n{GOOD}\n```"
    assert read_outlines(fenced, THREADS, BEFORE) == wanted


@pytest.mark.parametrize(
    ("old", "new", "kind", "says"),
    [
        ("<Outlines>", "", "form", "not one <Outlines>"),
        ("</Outlines>", "</Outlines> Done.", "form", "not one <Outlines>"),
        ("<Outline>2", "and <Outline>2", "form", "only <Outline>"),
        ("<Outline>2: case", "<Outline>case", "form", "only <Outline>"),
        ("<Outline>2: case 2, by hand</Outline>\n", "", "rule", "1 outlines for 2 threads"),
        ("</Outlines>", "<Outline>3: more</Outline>\n</Outlines>", "rule", "3 outlines for 2"),
        ("<Outline>2", "<Outline>3", "rule", "outline 2 has the number 3"),
        ("case 2, by hand", "case <Thread> 2", "rule", "outline 2 holds <Thread>"),
        ("case 2, by hand", "case <b>2</b>", "rule", "outline 2 holds <b>"),
        ("case 2, by hand", " ", "rule", "outline 2 has no text"),
        ("case 2, by hand", "case\n2", "rule", "more than one line"),
        ("case 2, by hand", "find that it is 4368", "rule", "names 4368, which comes out"),
        ("case 2, by hand", "get 4.5", "rule", "names 4.5, which comes out"),
        ("the product with 30", "12 times 30 = 360", "rule", "outline 1 names 360"),
    ],
)
def test_a_reply_that_breaks_a_rule_is_sent_back_with_the_breach(old, new, kind, says):
    assert old in GOOD
    with pytest.raises(Breach) as caught:
        read_outlines(GOOD.replace(old, new, 1), THREADS, BEFORE)
    assert caught.value.kind == kind and says in str(caught.value)


def test_a_reply_of_blank_lines_is_read_in_linear_time():
    blank = "\n" * 20_000
    with pytest.raises(Breach, match="not one <Outlines>"):
        read_outlines(f"<Outlines>{blank}x{blank}y", THREADS, BEFORE)
