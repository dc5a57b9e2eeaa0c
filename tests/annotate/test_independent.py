"""Step 3: replacements, and each rule with a reply that breaks it."""

from __future__ import annotations

import json

import pytest

from threadweaver.annotate.failures import Breach
from threadweaver.annotate.independent import read_independent

THREAD = "As above, n is odd. As above, we get 3 < 4.\n\n"


def test_replacements_take_the_first_place_one_after_the_other():
    reply = [{"src": "As above, n", "dest": "Here n"}, {"src": "As above, we", "dest": "We"}]
    assert read_independent(json.dumps(reply), THREAD) == "Here n is odd. We get 3 < 4.\n\n"
    fenced = f"```json\n{json.dumps(reply[:1])}\n```"
    assert read_independent(fenced, THREAD) == "Here n is odd. As above, we get 3 < 4.\n\n"


def test_nothing_to_replace_leaves_the_thread_verbatim():
    assert read_independent("[]", THREAD) == THREAD


@pytest.mark.parametrize(
    ("reply", "kind", "says"),
    [
        ("I would change nothing.", "form", "no JSON"),
        ("", "form", "no JSON"),
        ("[" * 100_000, "form", "no JSON"),
        ("[" + "9" * 5000 + "]", "form", "no JSON"),
        ('{"src": "a", "dest": "b"}', "form", "no JSON list"),
        ('["a"]', "form", "replacement 1 is not"),
        ('[{"src": "As"}]', "form", "replacement 1 is not"),
        ('[{"src": "As", "dest": null}]', "form", "replacement 1 is not"),
        ('[{"src": "As", "dest": "\\ud800"}]', "form", "half of a surrogate pair"),
        ('[{"src": "as before", "dest": ""}]', "rule", "does not occur"),
        ('[{"src": "", "dest": "x"}]', "rule", "does not occur"),
        ('[{"src": "odd. As", "dest": ""}, {"src": "odd", "dest": ""}]', "rule", "2: its src does"),
        ('[{"src": "As", "dest": "</Thread>As"}]', "rule", "holds </Thread>"),
        ('[{"src": "As above, n is odd. As ab", "dest": ""}]', "rule", "less than half"),
    ],
)
def test_a_reply_that_breaks_a_rule_is_sent_back_with_the_breach(reply, kind, says):
    with pytest.raises(Breach) as caught:
        read_independent(reply, THREAD)
    assert caught.value.kind == kind and says in str(caught.value)


def test_half_of_a_thread_may_go():
    assert read_independent('[{"src": "abcde", "dest": ""}]', "abcdefghij") == "fghij"
    with pytest.raises(Breach, match="less than half"):
        read_independent('[{"src": "abcdef", "dest": ""}]', "abcdefghij")
