"""loss_paths against the definition of docs/semantics.md, over sets of prefixes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trajectories import CODEC, Trajectory, trajectories, unhurried

from threadweaver.trajectory import extract_calls, loss_paths
from tw_kernels import Trie

Prefix = tuple[int, ...]

unrollable = trajectories(max_depth=2).filter(lambda t: bool(t.calls))


def prefixes(path: list[int]) -> list[Prefix]:
    return [tuple(path[: i + 1]) for i in range(len(path))]


def prefixes_with_loss(t: Trajectory, calls, loss: str) -> set[Prefix]:
    """A token of a trie is the prefix that ends in it."""
    found = {p for c in calls for p in prefixes(c.path)[len(c.context) :]}
    joined = [c.path for c in calls if c.kind == "sequential"]
    if loss == "response":
        found.update(prefixes(joined[-1])[t.prompt_length :])
    return found


@unhurried
@given(unrollable, st.sampled_from(["completions", "response"]))
def test_every_token_with_loss_weighs_one_and_no_other(t: Trajectory, loss):
    calls = extract_calls(t.ids, CODEC, t.prompt_length, max_depth=2)
    result = loss_paths(t.ids, CODEC, t.prompt_length, loss, max_depth=2)
    assert result.paths == [c.path for c in calls]
    assert result.dropped_calls == 0
    sums: dict[Prefix, float] = {}
    for path, weights in zip(result.paths, result.weights, strict=True):
        for prefix, weight in zip(prefixes(path), weights, strict=True):
            sums[prefix] = sums.get(prefix, 0.0) + weight
    expected = prefixes_with_loss(t, calls, loss)
    assert sums == {prefix: float(prefix in expected) for prefix in sums}
    assert result.num_tokens == len(sums)


@unhurried
@given(unrollable)
def test_forced_and_prompt_tokens_carry_no_loss_as_completions(t: Trajectory):
    result = loss_paths(t.ids, CODEC, t.prompt_length, "completions", max_depth=2)
    for (context, _), path, weights in zip(t.calls, result.paths, result.weights, strict=True):
        assert not any(weights[: len(CODEC.encode(context))])
        assert len(weights) == len(path)


@unhurried
@given(unrollable, st.data())
def test_budget_drops_the_fewest_whole_calls_from_the_end(t: Trajectory, data):
    calls = extract_calls(t.ids, CODEC, t.prompt_length, max_depth=2)
    sizes = [len({p for c in calls[: k + 1] for p in prefixes(c.path)}) for k in range(len(calls))]
    budget = data.draw(st.integers(0, sizes[-1] + 1))
    kept = sum(size <= budget for size in sizes)
    arguments = t.ids, CODEC, t.prompt_length, "response"
    if not kept:
        with pytest.raises(ValueError, match=f"first call alone has {sizes[0]} tokens, over"):
            loss_paths(*arguments, max_tokens=budget, max_depth=2)
        return
    result = loss_paths(*arguments, max_tokens=budget, max_depth=2)
    assert result.paths == [c.path for c in calls[:kept]]
    assert result.dropped_calls == len(calls) - kept
    assert result.num_tokens == sizes[kept - 1]
    expected = prefixes_with_loss(t, calls[:kept], "response")
    assert sum(map(sum, result.weights)) == len(expected)


@unhurried
@given(unrollable, st.sampled_from(["completions", "response"]))
def test_trie_of_the_paths_has_the_counted_size_and_weights(t: Trajectory, loss):
    result = loss_paths(t.ids, CODEC, t.prompt_length, loss, max_depth=2)
    trie = Trie.from_paths(result.paths, result.weights)
    assert len(trie) == result.num_tokens
    assert set(trie.positive_weights.tolist()) <= {0.0, 1.0}
    assert trie.positive_weights.sum() == sum(map(sum, result.weights))


def weighed(text: str, loss) -> list[str]:
    """Paths as text, a token without loss as a dot."""
    result = loss_paths(CODEC.encode(text), CODEC, 1, loss)
    return [
        "".join(CODEC.decode([id]) if w else "·" for id, w in zip(path, weights, strict=True))
        for path, weights in zip(result.paths, result.weights, strict=True)
    ]


def dots(text: str) -> str:
    return "·" * len(CODEC.encode(text))


def test_loss_of_a_small_trajectory():
    head = "<Parallel><Outlines><Outline>1:a</Outline><Outline>2:b</Outline></Outlines>"
    first, second = "<Thread>\n1:", "<Thread>\n2:"
    text = f"h{head}\n{first}c</Thread>{second}d</Thread>\n</Parallel>e"
    threads = [
        f"·{head}",
        dots(f"h{head}\n{first}") + "c</Thread>",
        dots(f"h{head}\n{second}") + "d</Thread>",
    ]
    join = dots(text[: text.index("</Parallel>")]) + "</Parallel>e"
    assert weighed(text, "completions") == [*threads, join]
    # The joined path adds the newlines, the first header and the copy of the second thread.
    join = f"{dots('h' + head)}\n{first}{dots('c</Thread>')}{second}d</Thread>\n</Parallel>e"
    assert weighed(text, "response") == [*threads, join]


def test_a_trajectory_that_ends_with_its_prompt_is_refused():
    with pytest.raises(ValueError, match="no token follows the 2 tokens of the prompt"):
        loss_paths([1, 2], CODEC, 2, "response")


def test_an_unknown_loss_is_refused():
    with pytest.raises(ValueError, match="must be one of completions, response"):
        loss_paths([1, 2], CODEC, 0, "all")  # pyright: ignore[reportArgumentType]
