"""Each rule of the format, broken in turn."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trajectories import EXAMPLE, Trajectory, trajectories, unhurried

from threadweaver.trajectory import TAGS, check_format, find_violations

TAG = re.compile("|".join(TAGS))


def block(outlines: str, threads: str) -> str:
    return f"<Parallel>\n<Outlines>\n{outlines}\n</Outlines>\n{threads}\n</Parallel>"


def numbered(n: int, thread: str = "a") -> str:
    return block(
        "\n".join(f"<Outline>{i}: a</Outline>" for i in range(1, n + 1)),
        "".join(f"<Thread>\n{i}: {thread}</Thread>" for i in range(1, n + 1)),
    )


@unhurried
@given(st.integers(1, 3).flatmap(lambda d: st.tuples(st.just(d), trajectories(max_depth=d))))
def test_well_formed_trajectories_have_no_violation(case: tuple[int, Trajectory]):
    max_depth, t = case
    assert check_format(t.text, max_depth=max_depth) == []


@unhurried
@given(trajectories(max_depth=2), st.data())
def test_a_missing_tag_is_a_violation(t: Trajectory, data):
    tags = list(TAG.finditer(t.text))
    if tags:
        tag = data.draw(st.sampled_from(tags))
        text = t.text[: tag.start()] + t.text[tag.end() :]
        assert check_format(text, max_depth=2) != []


@unhurried
@given(trajectories(max_depth=2), st.sampled_from([*TAGS, "<b>", "</b>"]), st.data())
def test_one_more_tag_in_a_block_is_a_violation(t: Trajectory, tag: str, data):
    blocks = list(re.finditer("<Parallel>.*</Parallel>", t.text, re.DOTALL))
    if blocks:
        at = data.draw(st.integers(blocks[0].start() + 10, blocks[-1].end() - 11))
        inside = [m for m in TAG.finditer(t.text) if m.start() < at < m.end()]
        between_blocks = t.text[:at].count("<Parallel>") == t.text[:at].count("</Parallel>")
        if not inside and not (between_blocks and "b" in tag):
            assert check_format(t.text[:at] + tag + t.text[at:], max_depth=2) != []


@pytest.mark.parametrize(
    "old, new, problem",
    [
        ("<think>", "", "line 13: </think> closes no <think>"),
        ("</think>", "", "line 1: <think> is never closed"),
        ("\ndone", "</Thread>", "line 11: </Thread> stands outside any block"),
        (
            "<Outlines>\n",
            "",
            "line 4: block 1 has <Outline> after <Parallel>: expected <Outlines>",
        ),
        (
            "</Outlines>",
            "",
            "line 8: block 1 has <Thread> after </Outline>: expected <Outline> or </Outlines>",
        ),
        (
            "</Outlines>",
            "</Outlines><Outlines></Outlines>",
            "line 7: block 1 has <Outlines> after </Outlines>: expected <Thread>",
        ),
        (
            "</Parallel>\n",
            "",
            "line 12: block 1 has </think> after </Thread>: "
            "expected <Thread> or <Conclusion> or </Parallel>",
        ),
        (
            EXAMPLE[EXAMPLE.index("</Parallel>") :],
            "",
            "line 3: block 1 is cut off after </Thread>: "
            "expected <Thread> or <Conclusion> or </Parallel>",
        ),
        (
            EXAMPLE[EXAMPLE.index("</Thread>\n</P") :],
            "",
            "line 9: block 1 has a thread that no </Thread> closes",
        ),
        ("1: the first", "the first", "line 5: block 1, outline 1 must read '1: text'"),
        ("1: the first", "1: ", "line 5: block 1, outline 1 has no text after '1:'"),
        (
            "2: the second",
            "3: the second",
            "line 6: block 1, outline 2 is numbered '3': outlines count 1, 2, 3, ...",
        ),
        (
            "<Outline>2: the second</Outline>\n",
            "",
            "line 3: block 1 has 1 outlines but 2 threads",
        ),
        (
            "<Thread>\n2: two</Thread>",
            "",
            "line 3: block 1 has 2 outlines but 1 threads",
        ),
        (
            "\n2: two",
            "\n1: two",
            r"line 9: block 1, thread 2 must begin with '2:', found '\n1: two'",
        ),
        (
            "</Thread><Thread>",
            "</Thread>\n<Thread>",
            r"line 9: block 1 has '\n' between threads: nothing may be",
        ),
        (
            "</Thread><Thread>",
            "</Thread>so<Thread>",
            "line 9: block 1 has 'so' between threads: nothing may be",
        ),
        (
            "2: two",
            "2: <b>two</b>",
            "line 10: block 1, thread 2 holds <b>: no tag may stand inside a thread",
        ),
        (
            "2: two",
            "2: " + numbered(1),
            "line 10: block 1, thread 2, block 1 is nested too deep: at most 1 (max_depth)",
        ),
        (
            "2: two",
            "2: <think>",
            "line 10: block 1, thread 2 holds <think>: no tag may stand inside a thread",
        ),
    ],
)
def test_a_broken_rule_is_named_with_its_place(old: str, new: str, problem: str):
    assert check_format(EXAMPLE) == []
    assert EXAMPLE.count(old) == 1
    assert any(p.startswith(problem) for p in check_format(EXAMPLE.replace(old, new)))


def test_at_most_fifty_outlines():
    assert check_format(numbered(50)) == []
    assert check_format(numbered(51)) == ["line 3: block 1 has 51 outlines: at most 50 are allowed"]


def test_white_space_between_threads_can_be_allowed():
    text = EXAMPLE.replace("</Thread><Thread>", "</Thread>\n <Thread>")
    assert check_format(text, allow_space_between_threads=True) == []
    text = text.replace("\n <Thread>", "so <Thread>")
    assert check_format(text, allow_space_between_threads=True) != []


def test_a_block_can_be_required():
    assert check_format("2 + 2 = 4") == []
    assert check_format("2 + 2 = 4", require_parallel=True) == ["there is no <Parallel> block"]
    assert check_format(EXAMPLE, require_parallel=True) == []


def test_a_conclusion_is_read_before_the_end_of_a_block_only():
    conclusion = "<Conclusion>so 3</Conclusion>\n"
    assert check_format(EXAMPLE.replace("</Parallel>", conclusion + "</Parallel>")) == []
    assert check_format(EXAMPLE.replace("</Parallel>\n", "</Parallel>\n" + conclusion)) != []
    assert check_format(EXAMPLE.replace("<Outlines>", conclusion + "<Outlines>")) != []


def test_nested_blocks_are_checked_to_max_depth():
    nested = numbered(2, thread=numbered(2))
    assert check_format(nested, max_depth=2) == []
    assert check_format(numbered(1, thread=nested), max_depth=3) == []
    assert check_format(numbered(1, thread=nested), max_depth=2) == [
        f"line {line}: block 1, thread 1, block 1, thread {n}, block 1 is nested too deep: "
        "at most 2 (max_depth)"
        for line, n in [(12, 1), (21, 2)]
    ]


def test_a_nested_block_ends_with_its_thread():
    problem = "line 6: block 1, thread 1, block 1 is cut off after <Parallel>: expected <Outlines>"
    assert check_format(numbered(1, thread="<Parallel>"), max_depth=2) == [problem]


def test_absurd_numbers_are_violations_like_others():
    huge = "1" * 5000  # more digits than int() takes
    problems = check_format(numbered(1).replace("1: a", f"{huge}: a"))
    assert len(problems) == 1
    assert len(problems[0]) < 120


def test_foreign_tags_outside_blocks_are_text():
    assert check_format(EXAMPLE.replace("done", "a <b>bold</b> claim")) == []


def test_each_broken_block_is_reported():
    broken = numbered(1).replace("1: a</Outline>", "2: a</Outline>")
    problems = check_format(f"{broken}\n{numbered(1)}\n{broken}")
    assert [re.findall(r"block \d", p)[0] for p in problems if "outline" in p] == [
        "block 1",
        "block 3",
    ]


@pytest.mark.parametrize(
    ("text", "found_at"),
    [
        ("ab\n</think>", "</think>"),
        ("<think>ab", "<think>"),
        ("a</Thread>b", "</Thread>"),
        (numbered(2).replace("</Outline>\n<Outline>2", "</Outline>\n<Outline>3"), "<Outline>3"),
        (numbered(2).replace("2: a</Thread>", "3: a</Thread>"), "<Thread>\n3"),
        (numbered(2).replace("</Thread><Thread>", "</Thread> x<Thread>"), " x<Thread>"),
        (numbered(1, "a<think>"), "<think>"),
        (numbered(2).replace("</Parallel>", ""), "<Parallel>"),
    ],
)
def test_a_violation_is_where_it_was_found(text, found_at):
    before = "one line\n\U0001f40c "
    violation, *_ = found = find_violations(before + text)
    assert (before + text)[violation.at :].startswith(found_at)
    assert [each.line for each in found] == check_format(before + text)
    line = (before + text)[: violation.at].count("\n") + 1
    assert violation.line.startswith(f"line {line}: ")


def test_what_the_whole_text_lacks_is_at_its_start():
    assert find_violations("a", require_parallel=True) == [("there is no <Parallel> block", 0)]
