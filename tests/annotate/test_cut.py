"""Step 2: groups become blocks, their lines verbatim, or are dropped."""

from __future__ import annotations

import pytest

from threadweaver.annotate.cut import MIN_CHARACTERS, Block, cut, marked_up, plain
from threadweaver.trajectory import check_format

LINES = [f"line {n} {'x' * 110}\n" for n in range(1, 9)]
TEXT = "".join(LINES)


def test_threads_are_the_lines_of_their_units_and_all_lines_stay_in_order():
    segments, dropped = cut(LINES, [[(6, 6), (7, 8)], [(2, 3), (4, 5)]])
    # The second thread of either group has two lines, or one of at least 100 characters.
    assert [d.reason for d in dropped] == [
        f"all threads but the longest hold under {MIN_CHARACTERS} characters together"
    ]
    first, block, rest = segments
    assert isinstance(block, Block) and isinstance(first, str) and isinstance(rest, str)
    assert block.threads == ["".join(LINES[1:3]), "".join(LINES[3:5])]
    assert plain(segments) == TEXT
    block.outlines = ["one", "two"]
    text = marked_up(segments)
    assert check_format(text, require_parallel=True) == []
    for thread in block.threads:
        assert thread.strip() in text
    assert text.startswith(first + "<Parallel>\n<Outlines>\n<Outline>1: one</Outline>\n")
    assert text.endswith("</Thread>\n</Parallel>\n" + rest)


@pytest.mark.parametrize(
    ("group", "reason"),
    [
        ([], "fewer than two threads"),
        ([(1, 8)], "fewer than two threads"),
        ([(1, 4), (4, 8)], "its ranges overlap"),
        ([(5, 8), (1, 4)], "its ranges overlap"),
        ([(1, 3), (5, 8)], "its ranges leave lines out"),
        ([(1, 4), (5, 9)], "none of the lines"),
        ([(0, 4), (5, 8)], "none of the lines"),
        ([(1, 4), (5, 4)], "none of the lines"),
        ([(1, 7), (8, 8)], "under 200 characters together"),
    ],
)
def test_a_group_that_is_no_block_is_dropped_and_its_lines_stay(group, reason):
    segments, dropped = cut(LINES, [group] if group else [[(1, 1)]])
    assert segments == [TEXT] and len(dropped) == 1 and reason in dropped[0].reason


def test_threads_of_two_hundred_characters_are_enough():
    lines = ["a" * 500 + "\n", "b" * 200 + "\n"]
    assert len(cut(lines, [[(1, 1), (2, 2)]])[0]) == 1
    lines[1] = "b" * 199 + "\n"
    assert cut(lines, [[(1, 1), (2, 2)]])[0] == ["".join(lines)]


def test_a_group_that_overlaps_another_is_dropped():
    segments, dropped = cut(LINES, [[(1, 2), (3, 4)], [(4, 6), (7, 8)]])
    assert [d.reason for d in dropped] == ["it overlaps another group"]
    assert plain(segments) == TEXT and sum(isinstance(s, Block) for s in segments) == 1
