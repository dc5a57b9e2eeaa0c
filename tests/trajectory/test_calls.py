"""extract_calls against calls known by construction, and on cut and malformed trajectories."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trajectories import CODEC, VOCAB, Trajectory, trajectories, unhurried

from threadweaver.trajectory import extract_calls


def decoded(text: str, **kwargs) -> list[tuple[str, str, str]]:
    calls = extract_calls(CODEC.encode(text), CODEC, **kwargs)
    return [(c.kind, CODEC.decode(c.context), CODEC.decode(c.completion)) for c in calls]


@unhurried
@given(st.integers(1, 3).flatmap(lambda d: st.tuples(st.just(d), trajectories(max_depth=d))))
def test_calls_are_those_the_state_machine_made(case: tuple[int, Trajectory]):
    max_depth, t = case
    calls = extract_calls(t.ids, CODEC, t.prompt_length, max_depth=max_depth)
    found = [(CODEC.decode(c.context), CODEC.decode(c.completion)) for c in calls]
    assert found == t.calls


@unhurried
@given(trajectories())
def test_main_line_completions_threads_and_forced_ids_make_up_the_trajectory(t: Trajectory):
    calls = extract_calls(t.ids, CODEC, t.prompt_length)
    covered = list(t.ids[: t.prompt_length])
    for call in calls:
        if call.kind == "sequential":
            assert call.context[: len(covered)] == covered
            forced = call.context[len(covered) :]
            assert forced in ([], [VOCAB["\n"]])
            covered = call.path
        else:
            fork_end = call.context.index(VOCAB["<Thread>"], call.spans[0][1])
            header = call.context[fork_end:]
            if covered[-1] == VOCAB["</Outlines>"]:
                covered.append(VOCAB["\n"])
            covered += header + call.completion
    assert covered == t.ids


@unhurried
@given(trajectories(), st.data())
def test_a_cut_trajectory_keeps_the_calls_made_before_the_cut(t: Trajectory, data):
    ids = t.ids
    cut = data.draw(st.integers(t.prompt_length, len(ids)))
    whole = extract_calls(ids, CODEC, t.prompt_length)
    part = extract_calls(ids[:cut], CODEC, t.prompt_length)
    # Every call but the last is untouched; the last was under way.
    untouched = [c for c in whole if c.spans[-1][1] <= cut]
    assert [(c.context, c.completion) for c in part[: len(untouched)]] == [
        (c.context, c.completion) for c in untouched
    ]
    assert len(part) <= len(untouched) + 1
    for call in part[len(untouched) :]:
        assert call.spans[-1][1] == cut


@unhurried
@given(st.lists(st.sampled_from([1, 2, 10, VOCAB["\n"], VOCAB[":"], *range(100, 112), 999])))
def test_any_ids_split_into_calls_whose_paths_are_slices(ids: list[int]):
    for max_depth in range(4):
        for call in extract_calls(ids, CODEC, max_depth=max_depth):
            assert call.completion
            assert call.path == call.context + call.completion
            assert all(0 <= start < end <= len(ids) for start, end in call.spans)
        if max_depth == 0:
            paths = [call.path for call in extract_calls(ids, CODEC, max_depth=0)]
            assert paths == ([ids] if ids else [])


def test_a_trajectory_without_a_block_is_one_call():
    assert decoded("ab: 12<eos>", prompt_length=2) == [("sequential", "ab", ": 12<eos>")]


def test_calls_of_a_small_trajectory():
    outlines = "<Outlines><Outline>1: b</Outline></Outlines>"
    text = f"a<Parallel>{outlines}\n<Thread>\n1:c</Thread>\n</Parallel>d"
    fork = text.index("\n<Thread>")
    join = text.index("</Parallel>")
    assert decoded(text) == [
        ("sequential", "", text[:fork]),
        ("thread", text[: fork + len("\n<Thread>\n1:")], "c</Thread>"),
        ("sequential", text[:join], "</Parallel>d"),
    ]


def test_tags_in_the_prompt_are_literal():
    prompt = "<Parallel><Outlines></Outlines><Thread>a"
    text = prompt + "b</Thread>c</Outlines>d"
    assert decoded(text, prompt_length=len(CODEC.encode(prompt))) == [
        ("sequential", prompt, "b</Thread>c</Outlines>"),
        ("sequential", prompt + "b</Thread>c</Outlines>", "d"),
    ]


def test_outlines_without_threads_end_a_call_and_force_nothing():
    assert decoded("<Parallel><Outlines></Outlines>\na") == [
        ("sequential", "", "<Parallel><Outlines></Outlines>"),
        ("sequential", "<Parallel><Outlines></Outlines>", "\na"),
    ]


def test_outlines_before_a_block_open_none_of_its_threads():
    assert decoded("</Outlines><Parallel><Thread>\n1:a</Thread>") == [
        ("sequential", "", "</Outlines>"),
        ("sequential", "</Outlines>", "<Parallel><Thread>\n1:a</Thread>"),
    ]


def test_a_request_that_got_nothing_back_is_left_out():
    text = "<Parallel><Outlines></Outlines>\n<Thread>\n1:"
    assert [kind for kind, _, _ in decoded(text)] == ["sequential"]
    assert decoded("") == []
    assert decoded("a", prompt_length=1) == []


@pytest.mark.parametrize(
    "header, context",
    [
        ("\n1:", "\n1:"),
        ("\n12.3 :", "\n12.3 :"),
        ("\n1a:", "\n1"),
        ("a1:", ""),
        ("\n1\n2:", "\n1\n"),
        ("1" * 99, "1" * 32),
    ],
)
def test_header_of_a_thread_is_context(header, context):
    calls = decoded(f"<Parallel><Outlines></Outlines><Thread>{header}b</Thread>")
    assert calls[1][1].endswith("<Thread>" + context)


def test_nested_blocks_are_literal_at_depth_one():
    inner = "<Parallel><Outlines></Outlines><Thread>b</Thread>"
    text = f"<Parallel><Outlines></Outlines><Thread>\n1:{inner}c</Thread></Parallel>"
    assert [kind for kind, _, _ in decoded(text)] == ["sequential", "thread", "sequential"]
    assert len(decoded(text, max_depth=2)) == 5


def test_prompt_length_out_of_range_is_refused():
    with pytest.raises(ValueError, match="prompt_length is 3, but there are 2 tokens"):
        extract_calls([1, 2], CODEC, 3)


def test_negative_max_depth_is_refused():
    with pytest.raises(ValueError, match="max_depth is -1"):
        extract_calls([1], CODEC, max_depth=-1)
