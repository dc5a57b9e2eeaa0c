"""Random rollouts: what requests say about shared KV, and that extract_calls finds them again."""

from hypothesis import given
from hypothesis import strategies as st
from rollouts import (
    CODEC,
    EOS,
    VOCAB,
    Completion,
    RandomModel,
    ids,
    randoms,
    unhurried,
    weaver_settings,
)

from threadweaver.generate import Request, RequestId, Weaver
from threadweaver.trajectory import check_format, extract_calls

PROMPT = ids("<Outlines>a1\n")
UNLIMITED = 10**6
NEWLINE, THREAD_END = VOCAB["\n"], VOCAB["</Thread>"]
# What the state machine writes where a line ends by force; in the finished text
# it looks like the completion of one more request.
FORCED_ENDS = [ids(text) for text in ("</Parallel>", "</Parallel>\n</Thread>", "\n</Thread>")]

Made = dict[RequestId, tuple[Request, Completion]]


def drive(weaver: Weaver, model: RandomModel, pick=lambda requests: requests[0]) -> Made:
    made: Made = {}
    while not weaver.done:
        request = pick(weaver.requests())
        completion = model(request)
        weaver.complete(request, *completion)
        assert request.id not in made
        made[request.id] = request, completion
    return dict(sorted(made.items()))


def as_written(request: Request, tokens: list[int]) -> list[int]:
    """The completion as the finished text shows it: a thread cut short was closed by force."""
    is_thread = THREAD_END in request.stop_ids
    if is_thread and (not tokens or tokens[-1] not in request.stop_ids or tokens[-1] == EOS):
        return [*(id for id in tokens if id != EOS), NEWLINE, THREAD_END]
    return tokens


@unhurried
@given(randoms, st.integers(1, 3))
def test_extract_calls_finds_exactly_the_calls_made(random, max_depth):
    weaver = Weaver(PROMPT, CODEC, UNLIMITED, max_depth=max_depth)
    made = drive(weaver, RandomModel(random, early=False))
    calls = extract_calls(PROMPT + weaver.response, CODEC, len(PROMPT), max_depth=max_depth)
    assert [(c.context, c.completion) for c in calls] == [
        (request.context, tokens) for request, (tokens, _) in made.values()
    ]


@unhurried
@given(randoms, weaver_settings())
def test_extract_calls_finds_the_calls_of_lines_that_ended_early(random, settings):
    weaver = Weaver(PROMPT, CODEC, **settings)
    made = drive(weaver, RandomModel(random))
    trajectory = PROMPT + weaver.response
    contexts = [request.context for request, _ in made.values()]
    found = [
        (call.context, call.completion)
        for call in extract_calls(trajectory, CODEC, len(PROMPT), max_depth=settings["max_depth"])
        if call.context in contexts or call.completion not in FORCED_ENDS
    ]
    written = [
        (request.context, as_written(request, tokens)) for request, (tokens, _) in made.values()
    ]
    expected = [call for call in written if call[1]]
    if len(weaver.response) == settings["max_tokens"]:
        # Cut somewhere, maybe in the middle of a call or of a forced tag.
        assert found[:-1] == expected[: len(found) - 1]
    else:
        assert found == expected


@unhurried
@given(randoms, weaver_settings())
def test_requests_and_response_do_not_depend_on_the_order_of_completions(random, settings):
    model = RandomModel(random)
    one, other = Weaver(PROMPT, CODEC, **settings), Weaver(PROMPT, CODEC, **settings)
    made = drive(one, model)
    again = drive(other, model, lambda requests: random.choice(requests))
    assert [vars(request) for request, _ in again.values()] == [
        vars(request) for request, _ in made.values()
    ]
    assert (other.response, other.limits) == (one.response, one.limits)


@unhurried
@given(randoms, weaver_settings())
def test_limits_hold_on_every_path(random, settings):
    weaver = Weaver(PROMPT, CODEC, **settings)
    made = drive(weaver, RandomModel(random))
    assert len(weaver.response) <= settings["max_tokens"]
    for request, _ in made.values():
        assert request.max_tokens >= 1
        assert len(request.context) + request.max_tokens <= len(PROMPT) + settings["max_tokens"]
        line = [r for r, _ in made.values() if r.id[:-1] == request.id[:-1]]
        if len(request.id) > 1:
            own = len(request.context) - len(line[0].context) + request.max_tokens
            assert own <= (settings["max_thread_tokens"] or own)
        forks = {r.id[: len(request.id)] for r, _ in made.values() if len(r.id) > len(request.id)}
        assert sum(r.id in forks for r in line) <= (settings["max_blocks"] or len(line))
        threads = {
            r.id[len(request.id)]
            for r, _ in made.values()
            if r.id[: len(request.id)] == request.id and r is not request
        }
        assert len(threads) <= settings["max_threads"]


@unhurried
@given(randoms, weaver_settings())
def test_context_begins_with_the_whole_path_of_its_parent(random, settings):
    weaver = Weaver(PROMPT, CODEC, **settings)
    kept: dict[RequestId, list[int]] = {}
    seen: set[RequestId] = set()
    while not weaver.done:
        for request in weaver.requests():
            if request.id in seen:
                continue
            seen.add(request.id)
            if request.parent is None:
                assert request.kind == "prompt"
            else:
                path = kept[request.parent]
                assert request.context[: len(path)] == path
        # What is not retained is never a parent later on: kept[...] above would fail.
        kept = {id: kept[id] for id in weaver.retained()}
        request = random.choice(weaver.requests())
        completion = RandomModel(random)(request)
        weaver.complete(request, *completion)
        kept[request.id] = request.context + completion.tokens
    assert weaver.retained() == set()


@unhurried
@given(randoms, st.integers(1, 3))
def test_kinds_say_what_a_request_does_with_its_parent(random, max_depth):
    weaver = Weaver(PROMPT, CODEC, UNLIMITED, max_depth=max_depth)
    made = drive(weaver, RandomModel(random, early=False))
    for request, _ in made.values():
        parent, completion = made[request.parent] if request.parent else (None, None)
        path = [*parent.context, *completion.tokens] if parent and completion else []
        forced = CODEC.decode(request.context[len(path) :])
        line, number = request.id[:-1], request.id[-1]
        previous = (*line, number - 1)
        if request.kind == "thread":
            assert number == 0 and request.parent == line[:-1]
            assert forced.startswith("\n<Thread>\n") and forced.endswith(":")
        elif request.kind == "continue":
            assert request.parent == previous and forced == ""
        elif request.kind == "join":
            # Fact 7: thread 1's path, then the other threads and a newline.
            assert request.parent is not None
            assert request.parent[:-1] == (*previous, 0)
            others = {
                id[: len(previous) + 1]: CODEC.decode(r.context + tokens)
                for id, (r, (tokens, _)) in made.items()
                if len(id) == len(previous) + 2 and id[:-2] == previous and id[-2] > 0
            }
            fork = CODEC.decode(made[previous][0].context + made[previous][1].tokens)
            assert forced == "".join(t[len(fork) + 1 :] for t in others.values()) + "\n"


@unhurried
@given(randoms, st.integers(1, 3))
def test_retained_is_what_a_join_extends(random, max_depth):
    weaver = Weaver(PROMPT, CODEC, UNLIMITED, max_depth=max_depth)
    model, retained, extended = RandomModel(random, early=False), set(), set()
    while not weaver.done:
        request = random.choice(weaver.requests())
        weaver.complete(request, *model(request))
        retained |= weaver.retained()
        extended |= {r.parent for r in weaver.requests() if r.kind == "join"}
    assert retained <= extended


def test_a_rollout_of_a_model_that_keeps_to_the_format_is_well_formed():
    fork = "a<Parallel>\n<Outlines>\n<Outline>1: a</Outline>\n<Outline>2: b</Outline>\n</Outlines>"
    texts = {
        (0,): fork,
        (0, 0, 0): "a</Thread>",
        (0, 1, 0): fork,
        (0, 1, 0, 0, 0): "</Thread>",
        (0, 1, 0, 1, 0): "b</Thread>",
        (0, 1, 1): "</Parallel>\n</Thread>",
        (1,): "</Parallel>\n" + fork,
        (1, 0, 0): "a</Thread>",
        (1, 1, 0): "b</Thread>",
        (2,): "</Parallel>\na",
    }
    weaver = Weaver(PROMPT, CODEC, 1000, max_depth=2)
    asked = []
    while not weaver.done:
        request = weaver.requests()[0]
        asked.append(request.id)
        weaver.complete(request, ids(texts[request.id]), "stop" if request.id != (2,) else "length")
    assert asked == list(texts)
    text = CODEC.decode(weaver.response)
    assert check_format(text, require_parallel=True, max_depth=2) == []
