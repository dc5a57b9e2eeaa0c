"""The state machine: golden rollouts, and each rule of docs/semantics.md on an example."""

import json
from pathlib import Path

import numpy as np
import pytest
from rollouts import CODEC, EOS, VOCAB, decoded, ids, run

from threadweaver.generate import LimitCounts, Weaver
from threadweaver.trajectory import Codec

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "golden.json").read_text())
GOLDEN_CODEC = Codec.from_vocab(GOLDEN["rollout_vocab"], eos_id=120)

FORK = "a<Parallel><Outlines><Outline>1: a</Outline><Outline>2: b</Outline></Outlines>"
JOINED = FORK + "\n<Thread>\n1:x</Thread><Thread>\n2:</Thread>\n"


def weaver(max_tokens: int = 1000, **settings) -> Weaver:
    return Weaver(ids("ab"), CODEC, max_tokens, **settings)


def text(weaver: Weaver) -> str:
    assert weaver.done
    return CODEC.decode(weaver.response)


@pytest.mark.parametrize("last_thread_first", [False, True])
@pytest.mark.parametrize(
    "case", GOLDEN["rollout"], ids=[f"{i}-{c['kind']}" for i, c in enumerate(GOLDEN["rollout"])]
)
def test_golden_rollouts_make_the_same_calls_and_end_in_the_same_response(case, last_thread_first):
    weaver = Weaver(case["prompt"], GOLDEN_CODEC, max_tokens=1500)
    calls = iter(case["calls"])
    while not weaver.done:
        opened = [(request, next(calls)) for request in weaver.requests()]
        for request, call in opened:
            assert request.context == call["prompt"]
            assert request.stop_ids == call["stop_ids"]
        for request, call in reversed(opened) if last_thread_first else opened:
            weaver.complete(request, call["completion"], call["finish_reason"])
    assert next(calls, None) is None
    assert weaver.response == case["response"]
    assert weaver.limits == LimitCounts()


def test_a_block_is_forked_joined_and_continued():
    w = weaver()
    contexts = run(w, FORK, "x</Thread>", "</Thread>", "</Parallel>x<eos>")
    assert contexts == [
        "ab",
        f"ab{FORK}\n<Thread>\n1:",
        f"ab{FORK}\n<Thread>\n2:",
        f"ab{JOINED}",
    ]
    assert text(w) == JOINED + "</Parallel>x<eos>"


def test_threads_are_open_at_once_and_join_in_outline_order():
    w = weaver()
    run(w, FORK)
    first, second = w.requests()
    w.complete(second, ids("</Thread>"), "stop")
    assert w.requests() == [first]
    w.complete(first, ids("x</Thread>"), "stop")
    assert [decoded(request) for request in w.requests()] == [f"ab{JOINED}"]


def test_outlines_without_a_number_go_on_sequentially():
    w = weaver()
    contexts = run(w, "<Outlines><Outline>x: 1</Outline></Outlines>", "</Outlines>", "a<eos>")
    assert contexts[2] == "ab<Outlines><Outline>x: 1</Outline></Outlines></Outlines>"
    assert text(w) == contexts[2][2:] + "a<eos>"


def test_outlines_are_read_since_the_last_opening_tag_without_duplicates():
    w = weaver()
    one, two = "<Outline>1: a</Outline>", "<Outline>\n 3.10 : b</Outline><Outline>2:</Outline>"
    run(w, f"<Outlines>{one}<Outlines>{two}{two}</Outlines>")
    assert [decoded(request).rsplit("\n", 1)[1] for request in w.requests()] == ["3.10:", "2:"]


def test_outlines_in_the_prompt_open_nothing():
    w = Weaver(ids("<Outlines><Outline>1: a</Outline>"), CODEC, 100)
    run(w, "</Outlines>")
    assert [request.kind for request in w.requests()] == ["continue"]


def test_eos_in_a_thread_closes_the_block_and_ends_the_response():
    w = weaver()
    run(w, FORK, "x<eos>", "a</Thread>")
    assert text(w) == FORK + "\n<Thread>\n1:x\n</Thread><Thread>\n2:a</Thread>\n</Parallel>"


def test_length_in_a_thread_closes_the_block_and_ends_the_response():
    w = weaver(max_thread_tokens=3)
    run(w, FORK, ("xxx", "length"), ("", "length"))
    assert text(w) == FORK + "\n<Thread>\n1:xxx\n</Thread><Thread>\n2:\n</Thread>\n</Parallel>"
    assert w.limits == LimitCounts(threads=2)


def test_an_empty_sequential_completion_ends_the_response():
    w = weaver()
    run(w, ("", "length"))
    assert text(w) == ""
    w = weaver()
    run(w, FORK, "x</Thread>", "</Thread>", ("", "length"))
    assert text(w) == JOINED


def test_sequential_mode_is_one_request_with_literal_tags():
    w = weaver(mode="sequential")
    (request,) = w.requests()
    assert (request.stop_ids, request.max_tokens) == ([EOS], 1000)
    run(w, JOINED + "</Parallel><eos>")
    assert text(w) == JOINED + "</Parallel><eos>"


def test_response_limit_ends_the_main_line():
    w = weaver(5)
    assert w.requests()[0].max_tokens == 5
    run(w, ("aaaaa", "length"))
    assert (text(w), w.limits) == ("aaaaa", LimitCounts(response=1))


def test_response_limit_leaves_no_room_to_fork_or_to_go_on():
    room = len(ids(FORK))
    w = weaver(room + len(ids("\n<Thread>\n1:")))
    run(w, FORK)
    assert (text(w), w.limits) == (FORK, LimitCounts(response=1))
    w = weaver(len(ids("</Outlines>")))
    run(w, "</Outlines>")
    assert (text(w), w.limits) == ("</Outlines>", LimitCounts(response=1))


@pytest.mark.parametrize("short", range(4))
def test_a_join_over_the_response_limit_is_closed_and_cut(short: int):
    whole = ids(JOINED + "</Parallel>")
    w = weaver(len(whole) - short)
    run(w, FORK, "x</Thread>", "</Thread>")
    if short == 0:
        assert w.requests()[0].max_tokens == 1
        return
    assert w.done and w.response == whole[: len(whole) - short]
    assert w.limits == LimitCounts(response=1)


def test_outlines_over_the_thread_limit_get_no_thread():
    w = weaver(max_threads=1)
    run(w, FORK, "x</Thread>", "</Parallel><eos>")
    assert text(w) == FORK + "\n<Thread>\n1:x</Thread>\n</Parallel><eos>"
    assert w.limits == LimitCounts(outlines=1)


def test_outlines_over_the_block_limit_end_the_response():
    w = weaver(max_blocks=1)
    run(w, FORK, "x</Thread>", "</Thread>", "</Parallel>" + FORK)
    assert text(w) == JOINED + "</Parallel>" + FORK
    assert w.limits == LimitCounts(blocks=1)


def test_a_thread_opens_a_block_of_its_own():
    w = weaver(max_depth=2)
    contexts = run(w, FORK, FORK, "x</Thread>", "</Thread>", "</Parallel>x</Thread>")
    thread_1 = f"ab{FORK}\n<Thread>\n1:"
    assert contexts[1:] == [
        thread_1,
        f"{thread_1}{FORK}\n<Thread>\n1:",
        f"{thread_1}{FORK}\n<Thread>\n2:",
        f"{thread_1}{JOINED}",
    ]
    run(w, "b</Thread>", "</Parallel><eos>")
    inner = JOINED + "</Parallel>x</Thread>"
    assert text(w) == (f"{FORK}\n<Thread>\n1:{inner}<Thread>\n2:b</Thread>\n</Parallel><eos>")


def test_threads_stop_at_outlines_only_above_the_deepest_level():
    outlines, thread = VOCAB["</Outlines>"], VOCAB["</Thread>"]
    w = weaver(max_depth=2)
    run(w, FORK)
    assert [r.stop_ids for r in w.requests()] == [[outlines, thread, EOS]] * 2
    run(w, FORK)
    assert [r.stop_ids for r in w.requests()][:2] == [[thread, EOS]] * 2


def test_eos_in_a_nested_thread_closes_every_block_around_it():
    w = weaver(max_depth=2)
    run(w, FORK, FORK, "<eos>", "x</Thread>")
    assert not w.done  # thread 2 of the outer block is still decoded
    run(w, "b</Thread>")
    inner = FORK + "\n<Thread>\n1:\n</Thread><Thread>\n2:x</Thread>\n</Parallel>\n</Thread>"
    assert text(w) == f"{FORK}\n<Thread>\n1:{inner}<Thread>\n2:b</Thread>\n</Parallel>"


def test_a_thread_over_its_block_limit_ends_as_by_length():
    w = weaver(max_depth=2, max_blocks=1)
    run(w, FORK, FORK, "x</Thread>", "</Thread>", "</Parallel>" + FORK, "</Thread>")
    thread = JOINED + "</Parallel>" + FORK + "\n</Thread>"
    assert text(w) == f"{FORK}\n<Thread>\n1:{thread}<Thread>\n2:</Thread>\n</Parallel>"
    assert w.limits == LimitCounts(blocks=1)


def test_response_shows_the_main_line_before_it_is_done():
    w = weaver()
    run(w, FORK, "x</Thread>")
    assert not w.done and w.response == ids(FORK)


def test_ids_may_come_as_numpy_arrays():
    w = Weaver(np.array(ids("ab")), CODEC, 10)
    w.complete(w.requests()[0], np.array([3, EOS]), "eos")
    assert w.response == [3, EOS] and all(type(id) is int for id in w.response)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"prompt_ids": []}, "the prompt is empty"),
        ({"max_tokens": 0}, "max_tokens is 0: it must be at least 1"),
        ({"max_depth": 0}, "max_depth is 0"),
        ({"max_threads": 0}, "max_threads is 0"),
        ({"max_thread_tokens": 0}, "max_thread_tokens is 0"),
        ({"max_blocks": -1}, "max_blocks is -1"),
        ({"mode": "both"}, "mode is 'both': it must be one of parallel, sequential"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Weaver(**{"prompt_ids": [1], "codec": CODEC, "max_tokens": 9, **settings})


def test_a_codec_without_newline_serves_sequential_mode_only():
    codec = Codec.from_vocab({k: v for k, v in VOCAB.items() if k != "\n"}, eos_id=EOS)
    with pytest.raises(ValueError, match="no id for a newline"):
        Weaver([1], codec, 9)
    assert Weaver([1], codec, 9, mode="sequential").requests()


@pytest.mark.parametrize(
    "tokens, reason, message",
    [
        ([1, EOS], "done", r"request \(0,\): reason is 'done', it must be one of stop, eos, len"),
        ([1, 2], "stop", r"reason is 'stop', but the tokens end in \[2\], which is none of"),
        ([], "stop", r"the tokens end in \[\]"),
        ([], "eos", r"the tokens end in \[\]"),
        ([VOCAB["</Outlines>"]], "eos", "reason is 'eos', but the tokens end in"),
        ([VOCAB["</Thread>"]], "stop", "reason is 'stop'"),
        ([EOS, 1, EOS], "stop", "the tokens go on after one of its stop ids"),
        ([1] * 10, "length", "10 tokens came back, max_tokens is 9"),
    ],
)
def test_what_cannot_be_a_completion_is_refused_and_changes_nothing(tokens, reason, message):
    w = weaver(9)
    (request,) = w.requests()
    with pytest.raises(ValueError, match=message):
        w.complete(request, tokens, reason)
    assert w.requests() == [request] and w.response == [] and w.limits == LimitCounts()


def test_closed_and_foreign_requests_and_tokens_after_done_are_refused():
    w, other = weaver(), weaver()
    (request,) = w.requests()
    with pytest.raises(ValueError, match=r"request \(0,\) is not open: it is closed, or another"):
        w.complete(other.requests()[0], [EOS], "eos")
    run(w, FORK)
    with pytest.raises(ValueError, match=r"request \(0,\) is not open: it is closed"):
        w.complete(request, [EOS], "eos")
    run(other, "<eos>")
    with pytest.raises(ValueError, match="is not open: the response is done"):
        other.complete(request, [EOS], "eos")


def test_thread_1_is_retained_until_the_join_unless_a_thread_ended_early():
    w = weaver(max_depth=2)
    run(w, FORK, "x</Thread>")
    assert w.retained() == {(0, 0, 0)}
    run(w, FORK, "x</Thread>")
    assert w.retained() == {(0, 0, 0), (0, 1, 0, 0, 0)}
    run(w, "<eos>")
    assert w.done and w.retained() == set()
    w = weaver(max_depth=2)
    run(w, FORK, "x</Thread>", FORK, "<eos>")
    assert not w.done and w.retained() == set()
