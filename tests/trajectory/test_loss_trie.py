"""loss_trie against its definition (docs/semantics.md), spelled out over sets of prefixes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trajectories import CODEC, Trajectory, trajectories, unhurried

from tests.kernels.tries import node_prefixes
from threadweaver.trajectory import extract_calls, loss_trie
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


def weights(trie: Trie) -> dict[Prefix, float]:
    return dict(zip(node_prefixes(trie), trie.columns["weights"].tolist(), strict=True))


def paths(trie: Trie) -> list[list[int]]:
    return [trie.tokens[trie.path_nodes(i)].tolist() for i in range(trie.num_paths)]


@unhurried
@given(unrollable, st.sampled_from(["completions", "response"]))
def test_every_token_with_loss_weighs_one_and_no_other(t: Trajectory, loss):
    calls = extract_calls(t.ids, CODEC, t.prompt_length, max_depth=2)
    trie, dropped_calls = loss_trie(t.ids, CODEC, t.prompt_length, loss, max_depth=2)
    assert dropped_calls == 0
    assert paths(trie) == [c.path for c in calls]
    expected = prefixes_with_loss(t, calls, loss)
    assert weights(trie) == {p: float(p in expected) for c in calls for p in prefixes(c.path)}


@unhurried
@given(unrollable)
def test_sequential_is_one_ordinary_sequence_after_the_prompt(t: Trajectory):
    trie, dropped_calls = loss_trie(t.ids, CODEC, t.prompt_length, "sequential", max_depth=2)
    assert (trie.tokens.tolist(), trie.num_paths, dropped_calls) == (t.ids, 1, 0)
    num_with_loss = len(t.ids) - t.prompt_length
    assert trie.columns["weights"].tolist() == [0.0] * t.prompt_length + [1.0] * num_with_loss


@unhurried
@given(unrollable)
def test_forced_and_prompt_tokens_carry_no_loss_as_completions(t: Trajectory):
    trie, _ = loss_trie(t.ids, CODEC, t.prompt_length, "completions", max_depth=2)
    completed = {
        p for c in t.calls for p in prefixes(CODEC.encode("".join(c)))[len(CODEC.encode(c[0])) :]
    }
    assert {p for p, weight in weights(trie).items() if weight} == completed


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
            loss_trie(*arguments, max_tokens=budget, max_depth=2)
        return
    trie, dropped_calls = loss_trie(*arguments, max_tokens=budget, max_depth=2)
    assert paths(trie) == [c.path for c in calls[:kept]]
    assert dropped_calls == len(calls) - kept
    expected = prefixes_with_loss(t, calls[:kept], "response")
    assert {p for p, weight in weights(trie).items() if weight} == expected


def with_loss(text: str, loss) -> list[str]:
    """Paths as text, a token without loss as a dot."""
    trie, _ = loss_trie(CODEC.encode(text), CODEC, 1, loss)
    ids = zip(trie.tokens.tolist(), trie.columns["weights"].tolist(), strict=True)
    texts = [CODEC.decode([id]) if weight else "·" for id, weight in ids]
    return ["".join(texts[at] for at in trie.path_nodes(i).tolist()) for i in range(trie.num_paths)]


def dots(text: str) -> str:
    return "·" * len(CODEC.encode(text))


def test_loss_of_a_small_trajectory():
    head = "<Parallel><Outlines><Outline>1:a</Outline><Outline>2:b</Outline></Outlines>"
    first, second = "\n<Thread>\n1:", "<Thread>\n2:"
    text = f"h{head}{first}c</Thread>{second}d</Thread>\n</Parallel>e"
    copied = dots(f"{second}d</Thread>\n")
    assert with_loss(text, "completions") == [
        f"·{head}",
        f"·{head}{dots(first)}c</Thread>",
        f"·{head}{dots(first[:-2] + '2:')}d</Thread>",
        f"·{head}{dots(first)}c</Thread>{copied}</Parallel>e",
    ]
    # The joined path adds the newlines, the first header and the copy of the second thread.
    assert with_loss(text, "response") == [
        f"·{head}",
        f"·{head}{first}c</Thread>",
        f"·{head}{first[:-2]}{dots('2:')}d</Thread>",
        f"·{text[1:]}",
    ]


def test_a_trajectory_that_ends_with_its_prompt_is_refused():
    with pytest.raises(ValueError, match="no token follows the 2 tokens of the prompt"):
        loss_trie([1, 2], CODEC, 2, "response")


def test_an_unknown_loss_is_refused():
    with pytest.raises(ValueError, match="must be one of completions, response"):
        loss_trie([1, 2], CODEC, 0, "all")  # pyright: ignore[reportArgumentType]
