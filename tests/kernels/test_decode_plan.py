"""The host plan of a decode step: its invariants by name, on random forests of sequences."""

import time

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.kernels.decode_batches import Batch, fork_join_batch, random_batch
from tw_kernels import DecodePlan, PlanSizes
from tw_kernels.decode.costs import Heads, of_gpu

batches = st.builds(
    random_batch,
    seed=st.integers(0, 2**32 - 1),
    sequences=st.integers(1, 12),
    page_size=st.sampled_from([1, 8, 16, 24, 64, 256]),
    longest=st.sampled_from([3, 40, 600]),
    most_new=st.sampled_from([1, 5, 300]),
)
options = st.fixed_dictionaries(
    {
        "num_workers": st.sampled_from([1, 3, 100]),
        "tile_rows": st.sampled_from([1, 7, 64]),
        "share": st.booleans(),
        "costs": st.sampled_from(
            [None, of_gpu(3, Heads(8, 2, 64)), of_gpu(132, Heads(32, 8, 128))]
        ),
    }
)
# A loaded machine must not fail a test by its speed.
many = settings(max_examples=60, deadline=None)


def row_of_query(plan):
    rows = plan.rows.tolist()
    return {query: row for row, query in enumerate(rows)}


def items_of(plan, row):
    """The items of a row, in the order of its merge list."""
    slots = plan.merge_slots[plan.merge_ptr[row] : plan.merge_ptr[row + 1]].tolist()
    found = []
    for slot in slots:
        own = [
            item
            for item in plan.items.tolist()
            if item[5] <= slot < item[5] + item[4] - item[3] and item[3] + slot - item[5] == row
        ]
        assert len(own) == 1
        found += own
    return found


def queries(batch):
    """(sequence, position, query) of every new token, queries counted in the caller's order."""
    query = 0
    for s in range(len(batch.tables)):
        for position in batch.positions(s):
            yield s, position, query
            query += 1


@many
@given(batches, options)
@example(  # a row whose run above was cut where the last row of another tile ends
    random_batch(seed=442, sequences=10, page_size=16, longest=600, most_new=300),
    {"num_workers": 1, "tile_rows": 64, "share": True, "costs": None},
)
def test_every_query_gets_every_page_of_its_sequence_exactly_once_and_in_order(batch, options):
    plan = batch.plan(**options)
    row_of = row_of_query(plan)
    pages, size = plan.pages.tolist(), batch.page_size
    for s, position, query in list(queries(batch))[:: 1 + batch.num_rows // 40]:
        got, keys = [], 0
        for first_page, num_keys, first_position, *_ in items_of(plan, row_of[query]):
            if first_position > position:
                continue  # seen by other rows of the tile alone
            assert first_position == len(got) * size  # so also: every run before is whole pages
            got += pages[first_page : first_page + -(-num_keys // size)]
            keys = first_position + num_keys
        assert keys > position
        assert got[: position // size + 1] == batch.tables[s][: position // size + 1]


@many
@given(batches, options)
def test_rows_are_the_new_tokens_with_their_positions_and_slots(batch, options):
    plan = batch.plan(**options)
    row_of = row_of_query(plan)
    assert sorted(row_of) == list(range(batch.num_rows))
    for s, position, query in queries(batch):
        row = row_of[query]
        assert plan.positions[row] == position
        assert plan.slots[row] == batch.slots(s)[position]


@many
@given(batches, options)
def test_the_readers_of_a_run_are_contiguous_rows_within_the_tile(batch, options):
    plan = batch.plan(**options)
    partials = 0
    for *_, first_row, end_row, _ in plan.items.tolist():
        assert 0 <= first_row < end_row <= batch.num_rows
        assert end_row - first_row <= options["tile_rows"]
        partials += end_row - first_row
    # Every row is in the items that its merge list names and in no other.
    assert partials == plan.merge_slots.numel()


@many
@given(batches, options)
def test_merge_lists_name_every_partial_slot_exactly_once(batch, options):
    plan = batch.plan(**options)
    assert sorted(plan.merge_slots.tolist()) == list(range(plan.size.slots))
    assert plan.merge_ptr[0] == 0 and plan.merge_ptr[-1] == plan.size.slots
    assert (plan.merge_ptr.diff() > 0).all()  # a row sees itself at least


@many
@given(batches)
def test_no_item_reads_beyond_the_last_token_that_its_rows_see(batch):
    plan = batch.plan()
    for _, num_keys, first_position, first_row, end_row, _ in plan.items.tolist():
        assert num_keys >= 1
        assert first_position + num_keys <= plan.positions[first_row:end_row].max() + 1


@many
@given(batches, options)
def test_most_work_comes_first_on_a_cpu(batch, options):
    items = batch.plan(**options | {"costs": None}).items
    work = [keys * (16 + end - first) for _, keys, _, first, end, _ in items]
    assert work == sorted(work, reverse=True)


@many
@given(batches)
def test_each_shared_page_is_in_exactly_one_run(batch):
    plan = batch.plan()
    pages = plan.pages.tolist()
    live = [t[: -(-n // batch.page_size)] for t, n in zip(batch.tables, batch.lengths, strict=True)]
    # These forks share pages only with the same pages before them, so the trie holds each once.
    assert sorted(pages) == sorted({page for table in live for page in table})
    unshared = batch.plan(share=False).pages.tolist()
    assert sorted(unshared) == sorted(page for table in live for page in table)


def keys_read(plan):
    return int(plan.items[:, 1].sum())


def test_shared_keys_are_read_once_for_all_rollouts_and_threads():
    batch = fork_join_batch(prefix=512, suffix=40, prompts=2, threads=8, page_size=16)
    assert keys_read(batch.plan()) == 2 * 512 + 16 * 40
    assert keys_read(batch.plan(share=False)) == 16 * (512 + 40)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("workers", [1, 8, 200])
def test_long_runs_are_cut_so_that_the_items_balance(workers, share):
    batch = fork_join_batch(prefix=32768, suffix=100, prompts=1, threads=6, page_size=16)
    plan = batch.plan(num_workers=workers, share=share)
    work = [keys * (16 + end - first) for _, keys, _, first, end, _ in plan.items.tolist()]
    # An item is at most half a worker's even share, rounded up to 64 keys of 6 rows.
    assert max(work) <= sum(work) / workers / 2 + 64 * (16 + 6)
    whole = 7 if share else 6
    assert len(work) <= whole + 2 * workers


def test_a_prompt_is_prefilled_in_tiles_that_read_no_later_keys():
    batch = Batch([list(range(64))], [1024], [1024], 16, 64)
    plan = batch.plan(num_workers=1)
    for _, num_keys, first_position, _, end_row, _ in plan.items.tolist():
        assert first_position + num_keys <= end_row
    pairs = sum(keys * (end - first) for _, keys, _, first, end, _ in plan.items.tolist())
    assert pairs == sum(64 * 64 * tile for tile in range(1, 17))


def test_a_sequence_whose_table_begins_another_ends_inside_its_runs():
    # The second continues the first's pages, which were full: the reader of an inner run.
    plan = DecodePlan.build([[0, 1, 2], [0, 1]], [40, 32], [1, 1], 16, num_workers=1)
    assert plan.rows.tolist() == [1, 0]
    assert plan.items.tolist() == [[0, 32, 0, 0, 2, 0], [2, 8, 32, 1, 2, 2]]


def test_tables_may_be_lists_arrays_of_any_integers_tensors_or_a_matrix():
    tables = [[5, 1, 7], [5, 1, 4]]
    want = DecodePlan.build(tables, [40, 33], [1, 1], 16).buffer
    int64 = np.array(tables)
    for same in (
        int64,
        int64.astype(np.int32),
        int64.astype(np.uint8),
        list(int64.astype(np.int32)),
        np.asfortranarray(int64.astype(np.int32)),
        torch.tensor(tables),
        [torch.tensor(t, dtype=torch.int32) for t in tables],
        [tuple(t) for t in tables],
    ):
        plan = DecodePlan.build(same, torch.tensor([40, 33]), np.array([1, 1]), 16)
        assert torch.equal(plan.buffer, want)


def test_entries_beyond_the_length_are_ignored():
    want = DecodePlan.build([[3], [4]], [16, 5], [1, 1], 16).buffer
    got = DecodePlan.build([[3, -1, -1], [4, 10**6, 3]], [16, 5], [1, 1], 16).buffer
    assert torch.equal(got, want)


def test_a_batch_may_be_empty():
    plan = DecodePlan.build([], [], [], 16)
    assert plan.size == PlanSizes(0, 0, 0, 0)
    assert plan.merge_ptr.tolist() == [0]


def test_tiles_may_be_as_large_as_they_like():
    batch = random_batch(2, sequences=6, page_size=16, longest=100, most_new=30)
    want = batch.plan(tile_rows=batch.num_rows).buffer
    assert torch.equal(batch.plan(tile_rows=2**31 - 1).buffer, want)


@pytest.mark.parametrize("buffer", [torch.zeros(7), torch.zeros(8).int(), torch.zeros(7, 1).int()])
def test_a_buffer_that_is_not_a_plans_is_refused(buffer):
    size = PlanSizes(rows=1, pages=1, items=0, slots=1)
    DecodePlan(torch.zeros(7, dtype=torch.int32), 16, 64, 1, size, size)
    with pytest.raises(ValueError, match=r"of this capacity is int32 \[7\], got torch"):
        DecodePlan(buffer, 16, 64, 1, size, size)


def test_a_plan_is_the_same_every_time():
    batch = random_batch(1, sequences=12, page_size=16, longest=300, most_new=40)
    assert torch.equal(batch.plan().buffer, batch.plan().buffer)


def test_capacity_fixes_the_shapes_and_pads_with_rows_and_items_that_do_nothing():
    batch = random_batch(2, sequences=6, page_size=16, longest=100, most_new=3)
    exact = batch.plan()
    room = PlanSizes(*(n + 5 for n in exact.size))
    plan = batch.plan(capacity=room)
    assert plan.capacity == room and plan.size == exact.size
    rows, pages, _, slots = exact.size
    assert plan.rows.tolist() == exact.rows.tolist() + list(range(rows, rows + 5))
    assert plan.positions.tolist() == exact.positions.tolist() + [-1] * 5
    assert plan.slots.tolist() == exact.slots.tolist() + [-1] * 5
    assert plan.merge_ptr.tolist() == exact.merge_ptr.tolist() + [slots] * 5
    assert plan.merge_slots[:slots].tolist() == exact.merge_slots.tolist()
    assert plan.items.tolist() == exact.items.tolist() + [[0] * 6] * 5
    assert plan.pages.shape == (pages + 5,) and torch.equal(plan.pages[:pages], exact.pages)
    assert plan.num_pages == exact.num_pages


def test_a_plan_takes_over_another_of_the_same_capacity_in_place():
    room = PlanSizes(64, 200, 100, 400)
    plan, other = (
        random_batch(seed, sequences=6, page_size=16, longest=90, most_new=3).plan(capacity=room)
        for seed in (3, 4)
    )
    address, plan.memo["stale"] = plan.items.data_ptr(), 1
    plan.copy_(other)
    assert plan.items.data_ptr() == address and torch.equal(plan.items, other.items)
    assert (plan.size, plan.num_pages, plan.memo) == (other.size, other.num_pages, {})
    with pytest.raises(ValueError, match="same capacity, page_size and tile_rows"):
        plan.copy_(DecodePlan.build([[0]], [1], [1], 16))


def test_a_large_batch_is_planned_in_milliseconds():
    # 262,144 table entries: about 1 ms here. The bound leaves room for a loaded machine.
    shared = np.arange(256, dtype=np.int32)
    own = np.arange(256, 256 + 512 * 256, dtype=np.int32).reshape(512, 256)
    tables = np.concatenate([np.broadcast_to(shared, (512, 256)), own], axis=1)
    lengths, new = np.full(512, 8190), np.ones(512, dtype=np.int64)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        DecodePlan.build(tables, lengths, new, 16, num_workers=132)
        times.append(time.perf_counter() - start)
    print(f"plan of 512 sequences x 512 pages: {min(times) * 1e3:.2f} ms")
    assert min(times) < 0.02


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": [40, 0]}, r"sequence 1: length 0 is not in \[1"),
        ({"new_tokens": [1, 0]}, r"sequence 1: new_tokens must be in \[1, length = 40\], got 0"),
        ({"new_tokens": [41, 1]}, r"sequence 0: new_tokens must be in \[1, length = 40\], got 41"),
        ({"lengths": [40, 49]}, "sequence 1: 49 tokens need 4 pages of 16, its table has 3"),
        ({"page_tables": [[0, 1, 2], [0, -1, 3]]}, r"sequence 1, table entry 1: page -1 is not in"),
        ({"page_tables": [[0, 1, 2], [0, 2**31, 3]]}, "sequence 1, table entry 1: page 2147483648"),
        ({"page_tables": np.array([[0, 1, 2], [0, 2**40, 3]])}, "sequence 1, table entry 1: page"),
        (
            {"page_tables": np.array([[0, 1, 2], [0, 2**29, 3]], np.int32)},
            "sequence 1, table entry 1: page",
        ),
        ({"page_tables": [[0, 1, 2], [0, 1, 2]]}, "sequences 0 and 1 both write page 2: copy"),
        ({"lengths": [40]}, "2 page tables need as many lengths and new_tokens, got 1 and 2"),
        ({"lengths": [[40], [40]]}, r"lengths must have one dimension, got shape \(2, 1\)"),
        ({"new_tokens": torch.tensor([[1, 1]])}, r"new_tokens must have one dimension, got"),
        ({"lengths": 40}, r"lengths must have one dimension, got shape \(\)"),
        ({"page_size": 0}, r"page_size must be in \[1, 2\^31\), got 0"),
        ({"page_size": -16}, r"page_size must be in \[1, 2\^31\), got -16"),
        ({"page_size": 2**40}, r"page_size must be in \[1, 2\^31\), got 1099511627776"),
        ({"num_workers": 0}, r"num_workers must be in \[1, 2\^31\), got 0"),
        ({"tile_rows": -1}, r"tile_rows must be in \[1, 2\^31\), got -1"),
        ({"capacity": PlanSizes(2, 3, 9, 9)}, "the plan has 4 pages, but its capacity is 3"),
        ({"capacity": PlanSizes(2**62, 9, 9, 9)}, r"capacity.rows must be in \[0, 2\^31\), got"),
        ({"capacity": PlanSizes(9, 9, 9, -1)}, r"capacity.slots must be in \[0, 2\^31\), got -1"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(change, message):
    call = {
        "page_tables": [[0, 1, 2], [0, 1, 3]],
        "lengths": [40, 40],
        "new_tokens": [1, 1],
        "page_size": 16,
    }
    DecodePlan.build(**call)
    with pytest.raises(ValueError, match=message):
        DecodePlan.build(**call | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"page_tables": [[0.5]]}, "sequence 0, table entry 0: a page is an integer, got float"),
        ({"page_tables": np.ones((1, 1))}, "sequence 0: a page table is a list, a NumPy array"),
        ({"page_tables": np.ones((1, 1, 1), int)}, r"a matrix .* got shape \(1, 1, 1\)"),
        ({"page_tables": torch.tensor([0])}, r"a matrix .* got shape \(1,\)"),
        ({"page_tables": torch.tensor(0)}, r"a matrix .* got shape \(\)"),
        ({"page_tables": [np.ones((1, 1), int)]}, "with one dimension"),
        ({"page_tables": [[True]]}, "sequence 0, table entry 0: a page is an integer, got bool"),
        ({"page_tables": torch.ones(1, 1)}, "page_tables must be integers, got torch.float32"),
        ({"page_tables": torch.ones(1, 1).bool()}, "sequence 0: a page table is a list, a NumPy"),
        (
            {"page_tables": [torch.ones(1).bfloat16()]},
            "sequence 0: a page table must be integers, got torch.bfloat16",
        ),
        ({"lengths": torch.ones(1).bfloat16()}, "lengths must be integers, got torch.bfloat16"),
        ({"new_tokens": [True]}, "new_tokens must be integers, got bool"),
        ({"page_size": 16.0}, "page_size must be an integer, got 16.0"),
        ({"tile_rows": True}, "tile_rows must be an integer, got True"),
        ({"num_workers": 1.5}, "num_workers must be an integer, got 1.5"),
        ({"capacity": (1.5, 9, 9, 9)}, "capacity.rows must be an integer, got 1.5"),
        ({"capacity": (9, 9, 9)}, "missing 1 required positional argument: 'slots'"),
        ({"lengths": [1.5]}, "lengths must be integers, got float64"),
    ],
)
def test_what_is_not_an_integer_is_refused(change, message):
    call = {"page_tables": [[0]], "lengths": [1], "new_tokens": [1], "page_size": 16}
    with pytest.raises(TypeError, match=message):
        DecodePlan.build(**call | change)
