import pytest
from hypothesis import given
from hypothesis import strategies as st
from trajectories import CODEC, Trajectory, trajectories, unhurried

from threadweaver.trajectory import extract_calls, path_lengths


@unhurried
@given(trajectories(max_depth=2))
def test_longest_path_is_at_most_the_total(t: Trajectory):
    ids = CODEC.encode(t.response)
    lengths = path_lengths(ids, CODEC, max_depth=2)
    assert lengths.total_tokens == len(ids)
    assert lengths.longest_path_tokens <= lengths.total_tokens
    assert 0 <= lengths.acceleration < 1
    if lengths.blocks == 0:
        assert lengths.longest_path_tokens == lengths.total_tokens
        assert lengths.mean_threads_per_block == 0


@unhurried
@given(trajectories())
def test_longest_path_leaves_out_all_but_the_longest_thread_of_a_block(t: Trajectory):
    bodies: list[list[int]] = []
    for call in extract_calls(t.ids, CODEC, t.prompt_length):
        if call.kind == "sequential":
            bodies.append([])
        else:
            start, end = call.spans[1]
            bodies[-1].append(end - start - 2)
    blocks = [b for b in bodies if b]
    lengths = path_lengths(CODEC.encode(t.response), CODEC)
    saved = sum(sum(b) - max(b) for b in blocks)
    assert lengths.longest_path_tokens == lengths.total_tokens - saved
    assert lengths.blocks == len(blocks)
    assert lengths.mean_threads_per_block * len(blocks) == pytest.approx(sum(map(len, blocks)))


@unhurried
@given(st.lists(st.sampled_from([1, 2, *range(100, 112)])), st.integers(0, 3))
def test_any_ids_have_a_longest_path_within_the_total(ids: list[int], max_depth: int):
    lengths = path_lengths(ids, CODEC, max_depth=max_depth)
    assert 0 <= lengths.longest_path_tokens <= lengths.total_tokens == len(ids)


def test_a_nested_thread_is_as_long_as_its_own_longest_path():
    inner = "<Parallel><Thread>aaaa</Thread><Thread>a</Thread></Parallel>"  # 6 tags, 4 or 1 inside
    text = f"<Parallel><Thread>{inner}</Thread><Thread>bbbbbbbbbbb</Thread></Parallel>"
    nested = path_lengths(CODEC.encode(text), CODEC, max_depth=2)
    # Outer tags 6; threads 6 + 4 = 10 and 11.
    assert (nested.total_tokens, nested.longest_path_tokens) == (6 + 11 + 11, 6 + 11)
    assert nested.blocks == 2
    assert nested.mean_threads_per_block == 2
    flat = path_lengths(CODEC.encode(text.replace("bb", "")), CODEC, max_depth=2)
    assert (flat.total_tokens, flat.longest_path_tokens) == (6 + 11 + 1, 6 + 10)


def test_an_empty_response_has_no_length():
    lengths = path_lengths([], CODEC)
    assert (lengths.total_tokens, lengths.longest_path_tokens, lengths.acceleration) == (0, 0, 0)
