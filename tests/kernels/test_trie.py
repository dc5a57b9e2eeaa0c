"""The trie: built as the reference builds it, and its geometry against brute force."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.tries import DATA, node_prefixes, random_layout, visible, within
from tw_kernels import Trie, TrieBuilder, TrieLayout

GOLDEN = json.loads((DATA / "golden.json").read_text())["trie"]

paths_of_few_tokens = st.lists(
    st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=12
)


def flatten_by_dicts(paths):
    """Preorder of a trie of nested dicts, children in insertion order."""
    root: dict = {}
    for path in paths:
        node = root
        for token in path:
            node = node.setdefault(token, {})
    tokens, positions, parents, ends = [], [], [], []

    def visit(children, depth, parent):
        for token, grandchildren in children.items():
            at = len(tokens)
            tokens.append(token)
            positions.append(depth)
            parents.append(parent)
            ends.append(0)
            visit(grandchildren, depth + 1, at)
            ends[at] = len(tokens)

    visit(root, 0, -1)
    return tokens, positions, parents, ends


@pytest.mark.parametrize("case", GOLDEN, ids=range(len(GOLDEN)))
def test_agrees_with_the_reference(case):
    trie = Trie.from_paths(case["paths"])
    assert trie.tokens.tolist() == case["tokens"]
    assert trie.positions.tolist() == case["positions"]
    assert trie.subtree_ends.tolist() == case["subtree_end"]


@given(paths_of_few_tokens)
def test_is_the_preorder_of_a_dict_trie_in_first_seen_order(paths):
    trie = Trie.from_paths(paths)
    tokens, positions, parents, ends = flatten_by_dicts(paths)
    assert trie.tokens.tolist() == tokens
    assert trie.positions.tolist() == positions
    assert trie.parents.tolist() == parents
    assert trie.subtree_ends.tolist() == ends


@given(paths_of_few_tokens)
def test_path_nodes_spell_the_path_and_follow_parents(paths):
    trie = Trie.from_paths(paths)
    assert trie.num_paths == len(paths)
    for i, path in enumerate(paths):
        nodes = trie.path_nodes(i)
        assert trie.tokens[nodes].tolist() == path
        assert trie.parents[nodes].tolist() == [-1, *nodes[:-1].tolist()]


@given(paths_of_few_tokens, st.randoms(use_true_random=False))
def test_columns_of_shared_tokens_add_up(paths, random):
    one, other = ([[random.choice([-1.5, 0.0, 1.0]) for _ in p] for p in paths] for _ in range(2))
    builder = TrieBuilder("one", "other")
    for path, x, y in zip(paths, one, other, strict=True):
        builder.add(path, other=y, one=x)
    trie = builder.build()
    for rows, name in ((one, "one"), (other, "other")):
        sums = dict.fromkeys(node_prefixes(trie), 0.0)
        for path, row in zip(paths, rows, strict=True):
            for i, value in enumerate(row):
                sums[tuple(path[: i + 1])] += value
        assert trie.columns[name].tolist() == list(sums.values())
    assert trie.columns["one"].tolist() == Trie.from_paths(paths, one).columns["weights"].tolist()


@given(paths_of_few_tokens)
def test_the_builder_says_how_large_the_trie_is_and_what_of_a_path_it_holds(paths):
    builder = TrieBuilder()
    held: set[tuple[int, ...]] = set()
    for path in paths:
        prefixes = [tuple(path[: i + 1]) for i in range(len(path))]
        assert builder.shared_prefix(path) == sum(prefix in held for prefix in prefixes)
        builder.add(path)
        held.update(prefixes)
        assert builder.num_tokens == len(held) == len(builder.build())


@given(st.lists(paths_of_few_tokens, min_size=1, max_size=4))
def test_pack_keeps_every_trie_as_it_was(forests):
    tries = [Trie.from_paths(paths, [[1.0] * len(p) for p in paths]) for paths in forests]
    pack = Trie.pack(tries)
    assert len(pack) == sum(len(t) for t in tries)
    start = number = 0
    for trie in tries:
        rows = slice(start, start + len(trie))
        assert torch.equal(pack.tokens[rows], trie.tokens)
        assert torch.equal(pack.positions[rows], trie.positions)
        assert torch.equal(pack.subtree_ends[rows], trie.subtree_ends + start)
        assert torch.equal(pack.columns["weights"][rows], trie.columns["weights"])
        is_root = trie.parents < 0
        assert (pack.parents[rows][is_root] == -1).all()
        assert torch.equal(pack.parents[rows][~is_root], trie.parents[~is_root] + start)
        for i in range(trie.num_paths):
            assert torch.equal(pack.path_nodes(number + i), trie.path_nodes(i) + start)
        start, number = start + len(trie), number + trie.num_paths


def test_lists_tuples_arrays_and_tensors_build_the_same_trie():
    lists = [[5, 6, 7, 300000], [5, 6, 9], [5, 6, 7, 300000, 1]]
    want = Trie.from_paths(lists)
    kinds = {
        "tuple": [tuple(p) for p in lists],
        "int32": [np.array(p, np.int32) for p in lists],
        "strided": [np.repeat(p, 2)[::2] for p in lists],
        "tensor": [torch.tensor(p) for p in lists],
        "mixed": [lists[0], np.array(lists[1]), torch.tensor(lists[2])],
    }
    for kind, paths in kinds.items():
        got = Trie.from_paths(paths)
        assert torch.equal(got.tokens, want.tokens), kind
        assert torch.equal(got.subtree_ends, want.subtree_ends), kind


class Endless(list):
    def __len__(self):
        return 2**31


@pytest.mark.parametrize(
    "paths, weights, error, message",
    [
        ([], None, ValueError, "no paths"),
        ([[1], []], None, ValueError, "path 1 is empty"),
        ([[1], [2, -3]], None, ValueError, "path 1, token 1: id -3 is negative"),
        ([[1, 2**31]], None, ValueError, "path 0, token 1: id 2147483648 does not fit in int32"),
        ([[1, 2**70]], None, ValueError, "does not fit in int32"),
        ([np.array([1, -1])], None, ValueError, "path 0, token 1: id -1 is negative"),
        ([np.broadcast_to(np.int64(1), 2**31)], None, ValueError, "path 0 has 2147483648 tokens"),
        (Endless([[1]]), None, ValueError, "2147483648 paths"),
        ([[1, 2.5]], None, TypeError, "path 0, token 1: ids must be integers, got float"),
        ([[1], [2, True]], None, TypeError, "path 1, token 1: ids must be integers, got bool"),
        ([np.array([1.0])], None, TypeError, "path 0: a path is a list"),
        ([np.zeros((2, 2), int)], None, TypeError, "path 0: a path is a list"),
        ([[1, 2]], [[1.0]], ValueError, "path 0 has 2 tokens: its weights"),
        ([[1, 2]], [], ValueError, "0 weight lists for 1 paths"),
    ],
)
def test_refuses_bad_input_and_says_where(paths, weights, error, message):
    with pytest.raises(error, match=message):
        Trie.from_paths(paths, weights)


def test_the_builder_refuses_what_does_not_fit_and_says_where():
    builder = TrieBuilder("a", "b")
    builder.add([1, 2], a=[0, 0], b=[0, 0])
    with pytest.raises(ValueError, match=r"needs the columns \['a', 'b'\], got \['a'\]"):
        builder.add([1], a=[0])
    with pytest.raises(ValueError, match="path 1 has 2 tokens: its b must be as many numbers"):
        builder.add([1, 3], a=[0, 0], b=[0])
    with pytest.raises(ValueError, match="path 1, token 0: id -1 is negative"):
        builder.shared_prefix([-1])
    assert builder.num_tokens == 2
    with pytest.raises(ValueError, match="no paths"):
        TrieBuilder().build()


def test_a_path_that_was_refused_is_refused_again():
    builder = TrieBuilder()
    for _ in range(2):
        with pytest.raises(ValueError, match="path 0, token 1: id -1 is negative"):
            builder.add([5, -1, 7])
    builder.add([5, 7])
    assert builder.build().tokens.tolist() == [5, 7]


def test_a_list_may_be_changed_after_it_was_added():
    builder, path = TrieBuilder(), [0]
    for token in range(70000, 70100):
        path[0] = 0
        path[0] = int(str(token))  # often lies where the one before it lay
        builder.add(path)
    assert builder.build().tokens.tolist() == [*range(70000, 70100)]


def test_pack_of_nothing_or_of_different_columns_is_refused():
    with pytest.raises(ValueError, match="no tries"):
        Trie.pack([])
    with pytest.raises(ValueError, match=r"trie 1 has the columns \[\], trie 0 \['weights'\]"):
        Trie.pack([Trie.from_paths([[1]], [[1.0]]), Trie.from_paths([[1]])])


@pytest.mark.parametrize("seed", range(5))
def test_subtree_ends_are_the_ancestor_mask(seed):
    layout = random_layout(seed)
    trie_mask = visible(layout.subtree_ends)
    assert layout.visible_pairs == trie_mask.sum()
    assert layout.density == trie_mask.double().mean().item()
    # a column's rows are one interval that starts at the column itself
    for j in range(layout.num_tokens):
        rows = trie_mask[:, j].nonzero().squeeze(-1)
        assert rows.tolist() == list(range(j, int(layout.subtree_ends[j])))


@pytest.mark.parametrize("seed", range(5))
def test_squares_and_rectangles_of_the_nodes_tile_the_visible_pairs(seed):
    layout = random_layout(seed)
    cover = torch.zeros(layout.num_tokens, layout.num_tokens, dtype=torch.int)
    for start, end, subtree_end in layout.nodes.tolist():
        cover[start:end, start:end] += torch.ones(end - start, end - start, dtype=torch.int).tril()
        cover[end:subtree_end, start:end] += 1
    assert torch.equal(cover, visible(layout.subtree_ends).int())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("block_q, block_kv", [(16, 16), (32, 8), (8, 32), (7, 5), (512, 512)])
def test_block_schedule_lists_each_touched_pair_once_and_marks_full_ones(seed, block_q, block_kv):
    layout = random_layout(seed)
    n = layout.num_tokens
    mask = visible(layout.subtree_ends)
    schedule = layout.block_schedule(block_q, block_kv)
    nq, nkv = -(-n // block_q), -(-n // block_kv)
    work_q, work_kv = [0] * nq, [0] * nkv
    q_blocks: list[list[int]] = [[] for _ in range(nkv)]
    q_full: list[list[int]] = [[] for _ in range(nkv)]
    for b in range(nq):
        begin, full_end, end = (
            int(x) for x in (schedule.row_ptr[b], schedule.full_end[b], schedule.row_ptr[b + 1])
        )
        full = schedule.kv_blocks[begin:full_end].tolist()
        partial = schedule.kv_blocks[full_end:end].tolist()
        assert full == sorted(full) and partial == sorted(partial)
        work_q[b] = len(full) + len(partial)
        for c in range(nkv):
            rows = mask[b * block_q : (b + 1) * block_q, c * block_kv : (c + 1) * block_kv]
            whole = bool(rows.all()) and (c + 1) * block_kv <= n
            assert (c in full) == whole
            assert (c in partial) == (bool(rows.any()) and not whole)
            if rows.any():
                q_blocks[c].append(b)
                work_kv[c] += 1
            if whole:
                q_full[c].append(b)
    for c in range(nkv):
        first, full_first, full_last, last = schedule.q_range[c].tolist()
        assert first <= full_first <= full_last <= last
        assert list(range(first, last)) == q_blocks[c]
        assert list(range(full_first, full_last)) == q_full[c]
    for order, work in ((schedule.q_order, work_q), (schedule.kv_order, work_kv)):
        assert sorted(order.tolist()) == list(range(len(work)))
        assert [work[b] for b in order.tolist()] == sorted(work, reverse=True)


@settings(max_examples=30)
@given(paths_of_few_tokens, st.integers(1, 6), st.integers(1, 6))
def test_block_schedule_visits_every_visible_pair(paths, block_q, block_kv):
    layout = Trie.from_paths(paths).layout()
    schedule = layout.block_schedule(block_q, block_kv)
    rows, columns = visible(layout.subtree_ends).nonzero(as_tuple=True)
    touched = set(zip((rows // block_q).tolist(), (columns // block_kv).tolist(), strict=True))
    listed = [
        (b, int(c))
        for b in range(len(schedule.full_end))
        for c in schedule.kv_blocks[schedule.row_ptr[b] : schedule.row_ptr[b + 1]]
    ]
    assert len(listed) == len(set(listed))
    assert set(listed) == touched


@pytest.mark.parametrize(
    "ends, message",
    [
        ([1, 2, 2], r"subtree_ends\[2\] is 2: must be above 2 and at most 3, where the tokens end"),
        ([3, 2, 0], r"subtree_ends\[2\] is 0: must be above 2 and at most 3, where its parent's"),
        ([2, 3, 3], r"subtree_ends\[1\] is 3: must be above 1 and at most 2, where its parent's"),
        ([4, 2, 3], r"subtree_ends\[0\] is 4: must be above 0 and at most 3"),
        ([-1], r"subtree_ends\[0\] is -1: must be above 0"),
    ],
)
def test_a_layout_refuses_ends_that_are_no_forest_in_preorder(ends, message):
    with pytest.raises(ValueError, match=message):
        TrieLayout(torch.tensor(ends, dtype=torch.int32))


@given(st.lists(st.integers(-1, 7), min_size=1, max_size=6))
def test_a_layout_takes_nested_ends_and_no_others(ends):
    n = len(ends)
    nested = all(i < end <= n for i, end in enumerate(ends)) and all(
        ends[j] <= ends[i] for i in range(n) for j in range(i + 1, min(ends[i], n))
    )
    try:
        layout = TrieLayout(torch.tensor(ends, dtype=torch.int32))
    except ValueError:
        assert not nested
    else:
        assert nested
        assert layout.longest_path == visible(layout.subtree_ends).sum(1).max()


@pytest.mark.parametrize(
    "ends",
    [torch.tensor([1, 2]), torch.ones(1, 1).int(), torch.tensor(1).int(), torch.ones(0).int()],
    ids=["int64", "2-D", "0-D", "empty"],
)
def test_a_layout_refuses_another_dtype_shape_or_no_token(ends):
    with pytest.raises(ValueError, match=r"subtree_ends must be int32 \[N\], N at least 1; got"):
        TrieLayout(ends)


def test_a_layout_of_a_strided_tensor_holds_a_contiguous_one():
    ends = torch.stack([torch.arange(1, 6), torch.zeros(5)], 1).int()[:, 0]
    layout = TrieLayout(ends)
    assert layout.subtree_ends.is_contiguous() and layout.subtree_ends.tolist() == [1, 2, 3, 4, 5]
    assert TrieLayout.of(layout.subtree_ends) is layout


@given(paths_of_few_tokens, st.integers(1, 14))
def test_window_starts_bound_what_a_window_leaves_of_the_path(paths, window):
    layout = Trie.from_paths(paths).layout()
    starts = layout.window_starts(window)
    assert starts.dtype == torch.int32 and layout.window_starts(window) is starts
    mask = visible(layout.subtree_ends)
    from_start = torch.arange(layout.num_tokens) >= starts[:, None]
    assert torch.equal(mask & from_start, within(mask, window))


def test_a_window_below_one_is_refused():
    layout = random_layout(0)
    for call in (layout.window_starts, lambda window: layout.block_schedule(8, 8, window)):
        with pytest.raises(ValueError, match="window must be at least 1, got 0"):
            call(0)


@settings(max_examples=60)
@given(paths_of_few_tokens, st.integers(1, 6), st.integers(1, 6), st.integers(1, 14))
def test_a_windowed_schedule_covers_the_visible_pairs_and_its_full_blocks_are_full(
    paths, block_q, block_kv, window
):
    layout = Trie.from_paths(paths).layout()
    n = layout.num_tokens
    mask = within(visible(layout.subtree_ends), window)
    schedule, plain = (layout.block_schedule(block_q, block_kv, w) for w in (window, None))
    assert plain.q_starts is None and schedule.q_starts is not None
    rows = layout.window_starts(window).split(block_q)
    assert schedule.q_starts.tolist() == [[int(r.min()), int(r.max())] for r in rows]

    def block(b, c):
        return mask[b * block_q : (b + 1) * block_q, c * block_kv : (c + 1) * block_kv]

    def listed(of):
        for b, (first, last) in enumerate(zip(of.row_ptr[:-1], of.row_ptr[1:], strict=True)):
            full = int(of.full_end[b]) - int(first)
            for place, c in enumerate(of.kv_blocks[first:last].tolist()):
                yield b, c, place < full

    blocks = {(b, c): full for b, c, full in listed(schedule)}
    assert blocks.keys() <= {(b, c) for b, c, _ in listed(plain)}
    for b in range(len(rows)):
        for c in range(-(-n // block_kv)):
            whole = bool(block(b, c).all()) and (c + 1) * block_kv <= n
            in_reach = (c + 1) * block_kv - 1 >= schedule.q_starts[b, 0]
            assert not block(b, c).any() or (b, c) in blocks
            assert (b, c) not in blocks or in_reach
            assert blocks.get((b, c), False) == whole
            # The pass over a KV block: its range, without what q_starts says it need not see.
            first, full_first, full_last, last = schedule.q_range[c].tolist()
            assert (first <= b < last and bool(in_reach)) == ((b, c) in blocks)
            all_reach = bool(c * block_kv >= schedule.q_starts[b, 1])
            assert (full_first <= b < full_last and all_reach) == whole
