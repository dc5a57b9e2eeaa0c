"""The share of a thread's 8-grams that stand in a sibling."""

import re

from hypothesis import given
from hypothesis import strategies as st
from trajectories import EXAMPLE, unhurried

from threadweaver.trajectory import redundancy
from threadweaver.trajectory.parser import parse
from threadweaver.trajectory.redundancy import block_redundancy, count_words, find_tags

EIGHT = "one two three four five six seven eight"


def block(*threads: str) -> str:
    outlines = "".join(f"<Outline>{i}: a</Outline>\n" for i in range(1, len(threads) + 1))
    bodies = "".join(f"<Thread>\n{i}: {t}</Thread>" for i, t in enumerate(threads, 1))
    return f"<Parallel>\n<Outlines>\n{outlines}</Outlines>\n{bodies}\n</Parallel>\n"


def test_an_8_gram_in_a_sibling_is_repeated():
    found = redundancy(block(f"{EIGHT} nine", f"zero {EIGHT}", "other words"))
    assert found == (2, 4) and found.share == 0.5


def test_words_are_compared_however_they_are_spaced():
    assert redundancy(block("a+b=c, d.", "a + b = c , d .")) == (2, 2)
    assert count_words("a+b=c, d.") == 8 and count_words("<think>a</think>") == 3


def test_seven_words_hold_no_8_gram():
    found = redundancy(block("1 2 3 4 5 6 7", "1 2 3 4 5 6 7"))
    assert found == (0, 0) and found.share is None


def test_the_header_is_no_word_of_a_thread():
    assert redundancy(block("2 3 4 5 6 7 8", "2 3 4 5 6 7 8")).grams == 0


def test_only_threads_of_the_same_block_are_siblings():
    assert redundancy(f"{EIGHT}\n{block(EIGHT, 'b')}{block(EIGHT, 'b')}{EIGHT}") == (0, 2)


def test_no_8_gram_runs_across_a_tag():
    nested = block("1 2 3 4", "5 6 7 8")
    assert redundancy(block(f"a {nested} b", f"a {nested} b"), max_depth=2) == (0, 0)


def test_threads_of_nested_blocks_are_counted_too():
    nested = block(EIGHT, EIGHT)
    found = redundancy(block(f"a {nested}", "b"), max_depth=2)
    # The two in the nested block, and in the outer thread nothing that its sibling says.
    assert found == (2, 4)


def test_a_text_without_threads_has_none():
    assert redundancy("") == redundancy(EIGHT * 3) == (0, 0)
    assert redundancy(EXAMPLE).share in (None, 0.0)


@unhurried
@given(st.lists(st.text("ab", max_size=24), min_size=1, max_size=4))
def test_counts_equal_those_of_every_pair_of_positions(threads: list[str]):
    bodies = [re.sub("(.)", r"\1 ", thread) for thread in threads]
    grams = [[tuple(t[i : i + 8]) for i in range(len(t) - 7)] for t in threads]
    expected = [
        (sum(any(g in o for j, o in enumerate(grams) if j != i) for g in own), len(own))
        for i, own in enumerate(grams)
    ]
    text = block(*bodies)
    [found] = parse(find_tags(text), 0, len(text), 1).blocks
    assert block_redundancy(text, found.threads) == expected
    assert redundancy(text) == (sum(r for r, _ in expected), sum(n for _, n in expected))
