"""A response taken apart into lanes: nothing lost, every length as the path metrics have it."""

from __future__ import annotations

import re
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trajectory.trajectories import CODEC, EXAMPLE, Trajectory, trajectories
from threadweaver.trajectory import TAGS, path_lengths, redundancy
from threadweaver.view.lanes import MOST_LEVELS, Lanes, lanes, tokens_of

IN_TOKENS = tokens_of(CODEC)
unhurried = settings(deadline=None, max_examples=30)


def text_and_marks(parts: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
    """The text of a line, and (number, character) of each mark in it."""
    text, marks = "", []
    for part in parts:
        if "s" in part:
            for piece in part["s"]:
                if isinstance(piece, str):
                    text += piece
                else:
                    marks.append((piece, len(text)))
            continue
        inner = part["b"] if "b" in part else [*part["open"], *part["t"], *part["close"]]
        found, found_marks = text_and_marks(inner)
        marks += [(number, len(text) + at) for number, at in found_marks]
        text += found
    return text, marks


def check(found: Lanes, text: str) -> None:
    assert text_and_marks(found.line)[0] == text
    lengths = path_lengths(CODEC.encode(text), CODEC, max_depth=MOST_LEVELS)
    assert (found.total, found.longest) == (lengths.total_tokens, lengths.longest_path_tokens)
    assert found.blocks == lengths.blocks
    assert found.threads == round(lengths.blocks * lengths.mean_threads_per_block)
    assert (found.repeated, found.grams) == redundancy(text, max_depth=MOST_LEVELS)


@unhurried
@given(trajectories(max_depth=3))
def test_lengths_are_those_of_the_path_metrics_and_no_text_is_lost(t: Trajectory):
    check(lanes(t.response, [], IN_TOKENS), t.response)


@unhurried
@given(trajectories(max_depth=2), st.data())
def test_that_holds_for_malformed_ones(t: Trajectory, data):
    tags = list(re.finditer("|".join(TAGS), t.response))
    if tags:
        tag = data.draw(st.sampled_from(tags))
        put = data.draw(st.sampled_from(["", *TAGS]))
        text = t.response[: tag.start()] + put + t.response[tag.end() :]
        check(lanes(text, [], IN_TOKENS), text)


@unhurried
@given(trajectories(), st.lists(st.integers(0, 400), max_size=4))
def test_marks_stand_at_their_characters(t: Trajectory, marks: list[int]):
    plain, marked = lanes(t.response, []), lanes(t.response, marks)
    text, found = text_and_marks(marked.line)
    assert text == t.response
    last = max(len(text) - 1, 0)
    assert sorted(found) == ([(n, min(at, last)) for n, at in enumerate(marks)] if text else [])
    assert marked[1:] == plain[1:]


def test_the_longest_thread_of_a_block_is_on_the_critical_path():
    [block] = [part for part in lanes(EXAMPLE, []).line if "b" in part][:1]
    threads = [part for part in block["b"] if "t" in part]
    assert len(threads) > 1
    longest = max(thread["n"] for thread in threads)
    assert [bool(t.get("k")) for t in threads].count(True) == 1 and block["n"] == longest
    assert next(t for t in threads if t.get("k"))["n"] == longest


def test_an_empty_response_has_no_parts():
    assert lanes("", [0]) == ([], 0, 0, 0, 0, 0, 0)
