"""Step 1: a map is read, and each rule has a reply that breaks it."""

from __future__ import annotations

import pytest

from threadweaver.annotate.failures import Breach
from threadweaver.annotate.map import read_map

GOOD = """1 [1-3] understand: what is asked
2 [4-11] work: both cases
2.1 [4-7] work: n is even
2.2 [8-11] work: n is odd
3 [12-12] dead-end: by induction
4 [13-20] check: by an example
parallel 3 | 4
parallel 2.1 | 2.2"""


def test_steps_groups_and_the_lines_of_units():
    found = read_map(f"```\n{GOOD}\n```", 20)
    assert [step.name for step in found.steps] == ["1", "2", "2.1", "2.2", "3", "4"]
    assert found.ranges == [[(12, 12), (13, 20)], [(4, 7), (8, 11)]]


def test_a_unit_may_be_a_run_of_steps_and_a_map_may_have_no_group():
    runs = GOOD.partition("parallel")[0] + "parallel 2-3 | 4"
    assert read_map(runs, 20).ranges == [[(4, 12), (13, 20)]]
    runs = GOOD.partition("parallel")[0].replace("2.2 [8-11]", "2.2 [8-9] work: a\n2.3 [10-11]")
    assert read_map(f"{runs}parallel 2.1-2.2 | 2.3", 20).ranges == [[(4, 9), (10, 11)]]
    assert read_map(GOOD.partition("parallel")[0], 20).groups == []


@pytest.mark.parametrize(
    ("old", "new", "kind", "says"),
    [
        # form
        (GOOD, "I see four steps.", "form", "neither a step nor a group"),
        (GOOD, "", "form", "no step"),
        ("3 [12-12] dead-end", "3 [12-12] mistake", "form", "neither a step nor a group"),
        ("3 [12-12]", "3 [12]", "form", "neither"),
        ("work: n is odd", "work:", "form", "neither"),
        ("parallel 3 | 4", "parallel 3 and 4", "form", "the unit '3 and 4'"),
        ("parallel 3 | 4", "parallel 3 |", "form", "the unit ''"),
        ("parallel 2.1", "5 [21-22] work: more\nparallel 2.1", "form", "after the first"),
        # the numbers of steps
        ("3 [12-12]", "5 [12-12]", "rule", "step 5 stands where 3 should"),
        ("1 [1-3]", "0 [1-3]", "rule", "step 0 stands where 1 should"),
        ("2.2 [8-11]", "2.3 [8-11]", "rule", "step 2.3 stands where 2.2 should"),
        ("2.2 [8-11]", "1.2 [8-11]", "rule", "step 1.2 stands where 2.2 should"),
        ("1 [1-3]", "1.1 [1-3]", "rule", "where 1 should"),
        # consecutive, no gap, from the first line to the last
        ("1 [1-3]", "1 [2-3]", "rule", "step 1 starts at line 2 and must start at 1"),
        ("2 [4-11]", "2 [5-11]", "rule", "step 2 starts at line 5 and must start at 4"),
        ("2 [4-11]", "2 [3-11]", "rule", "step 2 starts at line 3 and must start at 4"),
        ("4 [13-20]", "4 [13-19]", "rule", "step 4 ends at line 19 and must end at 20"),
        ("4 [13-20]", "4 [13-21]", "rule", "step 4 ends at line 21 and must end at 20"),
        ("3 [12-12]", "3 [12-11]", "rule", "step 3 ends before it starts"),
        ("2.2 [8-11]", "2.2 [9-11]", "rule", "step 2.2 starts at line 9 and must start at 8"),
        ("2.2 [8-11]", "2.2 [8-10]", "rule", "ends at line 10 and must end at 11, the"),
        # groups
        ("parallel 3 | 4", "parallel 3 | 5", "rule", "names step 5"),
        ("parallel 3 | 4", "parallel 2 | 4", "rule", "step 4 does not come right after step 2"),
        ("parallel 3 | 4", "parallel 4 | 3", "rule", "step 3 does not come right after step 4"),
        ("parallel 3 | 4", "parallel 3 | 3-4", "rule", "step 3 does not come right after step 3"),
        ("parallel 3 | 4", "parallel 4-3 | 4", "rule", "unit 4-3 ends before it starts"),
        ("parallel 3 | 4", "parallel 2.2 | 3", "rule", "all main steps or all substeps of one"),
        ("parallel 3 | 4", "parallel 2.1-3 | 4", "rule", "no run of main steps, nor of substeps"),
        ("parallel 3 | 4", "parallel 1 | 2", "rule", "step 1 understands the problem"),
        ("parallel 3 | 4", "parallel 2 | 3", "rule", "step 2.1 is in a group, and so is step 2"),
        ("parallel 2.1", "parallel 3 | 4\nparallel 2.1", "rule", "step 3 is in a group"),
        ("parallel 3", "parallel 2.1 | 2.2\nparallel 3", "rule", "main steps come before"),
    ],
)  # fmt: skip
def test_a_reply_that_breaks_a_rule_is_sent_back_with_the_breach(old, new, kind, says):
    assert old in GOOD
    with pytest.raises(Breach) as caught:
        read_map(GOOD.replace(old, new), 20)
    assert caught.value.kind == kind and says in str(caught.value)
