"""The page of a trie: its schedule against the mask itself, its ancestors against the trie."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest

from bench.shapes import trajectory
from tests.trajectory.trajectories import CODEC
from tests.view.browser import Opened, data_of
from threadweaver.data import DataError
from threadweaver.trajectory import extract_calls
from threadweaver.view.rows import Row
from threadweaver.view.trie import blocks_of, trie_of, trie_page
from threadweaver.whole_file import write_whole
from tw_kernels import Trie

EXAMPLE = """<think>
a bad cab
<Parallel>
<Outlines>
<Outline>1: add</Outline>
<Outline>2: feed</Outline>
</Outlines>
<Thread>
1: add 1 12 123</Thread><Thread>
2: feed a hag</Thread>
</Parallel>
12, 3.</think>
3"""


def row(response: str, prompt: str = "a") -> Row:
    return Row(prompt, response, None, None, None, None, None, "f.jsonl:3")


def text_of(id: int) -> str:
    return CODEC.decode([id]) if id < 200 else f"w{id} "


def random_trie(seed: int) -> Trie:
    rng = random.Random(seed)
    paths = [[rng.randrange(3) for _ in range(rng.randrange(1, 30))] for _ in range(12)]
    return Trie.from_paths(paths)


def ancestors(trie: Trie, i: int) -> list[int]:
    """Token i and those above it, by the parents."""
    found = [i]
    while (above := int(trie.parents[found[-1]])) >= 0:
        found.append(above)
    return found[::-1]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sizes", [(4, 4), (8, 3), (1, 1), (64, 200)])
def test_the_blocks_and_computed_pairs_are_those_of_the_mask(seed, sizes):
    trie, (block_q, block_kv) = random_trie(seed), sizes
    n = len(trie)
    mask = np.zeros((n, n), bool)
    for i in range(n):
        mask[i, ancestors(trie, i)] = True
    full = partial = computed = 0
    for q in range(0, n, block_q):
        for k in range(0, n, block_kv):
            tile = mask[q : q + block_q, k : k + block_kv]
            # A block of columns that reaches beyond the trie needs the mask for what is missing.
            whole = tile.all() and tile.shape[1] == block_kv
            full += int(whole)
            partial += int(tile.any() and not whole)
            computed += block_q * block_kv if tile.any() else 0
    found = blocks_of(trie.layout(), block_q, block_kv)
    assert (found.full, found.partial) == (full, partial)
    page = trie_page(trie, text_of, "t", block_q=block_q, block_kv=block_kv)
    about = data_of(page)["about"]
    assert about["visible"] == mask.sum() and about["computed"] == computed


def test_the_trie_is_of_the_calls_of_the_trajectory():
    trie = trie_of(row(EXAMPLE), CODEC, 1)
    calls = extract_calls([*CODEC.encode("a"), *CODEC.encode(EXAMPLE)], CODEC, 1)
    assert trie.num_paths == len(calls)
    for i, call in enumerate(calls):
        assert trie.tokens[trie.path_nodes(i)].tolist() == call.path
    sampled = sum(call.completion_length for call in calls)
    assert trie.columns["weights"].sum() == sampled


def test_a_row_without_a_trie_is_named():
    with pytest.raises(DataError, match=r"^f.jsonl:3: no token follows"):
        trie_of(row(""), CODEC, 1)
    with pytest.raises(DataError, match=r"^f.jsonl:3: .*lacks"):
        trie_of(row("\u2603"), CODEC, 1)


@pytest.fixture(scope="module")
def page(browser, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_whole(
        path, trie_page(trie_of(row(EXAMPLE), CODEC, 1), text_of, "f", block_q=16, block_kv=16)
    )
    page = Opened(browser, path)
    yield page
    page.close()


def lit(page: Opened) -> list[int]:
    """The tokens in sight that are lit."""
    return page.view.eval_on_selector_all(".t.lit", "all => all.map(t => Number(t.dataset.i))")


def test_hovering_a_token_lights_exactly_its_ancestors(page):
    trie = trie_of(row(EXAMPLE), CODEC, 1)
    seen = page.view.evaluate("document.querySelectorAll('.t').length")
    assert seen == len(trie)  # all are in sight
    for i in random.Random(0).sample(range(len(trie)), 25):
        page.view.hover(f".t[data-i='{i}']")
        assert lit(page) == ancestors(trie, i)
        assert page.view.inner_text("#token strong").strip() == f"Token {i}"


def test_keys_walk_along_the_tree(page):
    trie = trie_of(row(EXAMPLE), CODEC, 1)
    last = len(trie) - 1
    page.view.evaluate(f"pin({last})")
    page.view.keyboard.press("ArrowUp")
    assert lit(page) == ancestors(trie, int(trie.parents[last]))
    page.view.keyboard.press("ArrowLeft")
    assert page.view.evaluate("self") == int(trie.parents[last]) - 1
    page.view.keyboard.press("Escape")
    assert lit(page) == []


def test_the_mask_is_painted_as_the_ends_say(page):
    """At the middle of the pixels of each pair, the whole trie in sight."""
    trie = trie_of(row(EXAMPLE), CODEC, 1)
    n = len(trie)
    page.view.evaluate("pin(-1), view = whole(), paintMask()")
    found = np.array(
        page.view.evaluate(
            """() => {
              const scale = canvas.width / N, tones = {};
              for (const name of ["paper", "bar", "critical", "critical-soft"]) {
                tones[parts(name).slice(0, 3).join()] = name;
              }
              const at = (q, k) => {
                const x = Math.floor((k + .5) * scale), y = Math.floor((q + .5) * scale);
                const from = 4 * (y * canvas.width + x);
                return tones[picture.data.slice(from, from + 3).join()] ?? "?";
              };
              const all = [...Array(N).keys()];
              return all.map((q) => all.map((k) => at(q, k)));
            }"""
        )
    )
    assert page.view.evaluate("canvas.width / N") > 2
    for q, above in ((q, set(ancestors(trie, q))) for q in range(n)):
        visible = np.isin(found[q], ["bar", "critical"])
        assert set(np.flatnonzero(visible)) == above


def test_no_line_of_the_list_mixes_nodes(page):
    lines = page.view.evaluate("lines.map((line) => [line.from, line.to])")
    trie = trie_of(row(EXAMPLE), CODEC, 1)
    assert lines[0][0] == 0 and lines[-1][1] == len(trie)
    assert all(left[1] == right[0] for left, right in pairwise(lines))
    nodes = {int(start) for start in trie.layout().nodes[:, 0]}
    assert nodes <= {start for start, _ in lines}


@pytest.mark.slow
def test_a_trie_of_34408_tokens_opens_in_two_seconds(browser, tmp_path):
    trie = trajectory(34408, 6).trie
    path = tmp_path / "page.html"
    write_whole(path, trie_page(trie, text_of, "trajectory-34408", block_q=128, block_kv=128))
    seconds = []
    for _ in range(3):
        page = Opened(browser, path)
        seconds.append(page.seconds_to_open)
        page.view.evaluate("pin(20000)")
        assert page.view.evaluate("Array.from(lit)") == ancestors(trie, 20000)
        assert set(lit(page)) < set(ancestors(trie, 20000))
        page.close()
    print(f"{path.stat().st_size / 1e6:.1f} MB: {seconds} s")
    assert min(seconds) < 2
