"""The page pool: each operation by hand, all of them against a reference model, and its speed."""

from collections import Counter
from copy import deepcopy
from time import perf_counter

import pytest
from hypothesis import assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from simulated_pages import SimulatedPages

from threadweaver.generate.pages import Copy, OutOfPages, PagePool, PageTable


def filled(pool: PagePool, count: int) -> PageTable:
    table = PageTable()
    pool.append([table], [count])
    return table


def state(pool: PagePool, *tables: PageTable):
    """All there is to compare before and after a refusal."""
    counts = {name: v.tolist() if hasattr(v, "tolist") else v for name, v in vars(pool).items()}
    return deepcopy([counts, [(table.pages, table.length) for table in tables]])


def test_append_fills_pages_slot_by_slot():
    pool, table = PagePool(4, page_size=4), PageTable()
    assert pool.append([table], [3]) == []
    first = list(table.pages)
    assert (table.length, len(first), pool.free_pages) == (3, 1, 3)
    assert pool.append([table], [6]) == []
    assert list(table.pages)[:1] == first
    assert (table.length, len(set(table.pages)), pool.free_pages) == (9, 3, 1)


def test_append_serves_several_tables_and_counts_of_zero():
    pool, a, b, c = PagePool(4, page_size=2), PageTable(), PageTable(), PageTable()
    assert pool.append([a, b, c], [1, 0, 3]) == []
    assert (a.length, b.length, c.length, list(b.pages)) == (1, 0, 3, [])
    assert len({*a.pages, *c.pages}) == 3


def test_fork_shares_every_page_and_takes_none():
    pool = PagePool(3, page_size=4)
    table = filled(pool, 10)
    fork = pool.fork(table)
    assert (fork.pages, fork.length, pool.free_pages) == (table.pages, 10, 0)


def test_append_after_a_fork_copies_the_partial_page_alone_and_the_last_holder_writes_in_place():
    pool = PagePool(8, page_size=4)
    table = filled(pool, 6)
    forks = [pool.fork(table), pool.fork(table)]
    shared = table.pages[1]
    assert pool.append([table, *forks], [1, 1, 1]) == [
        Copy(shared, table.pages[1], tokens=2),
        Copy(shared, forks[0].pages[1], tokens=2),
    ]
    assert forks[1].pages[1] == shared
    assert len({t.pages[0] for t in [table, *forks]}) == 1
    assert len({t.pages[1] for t in [table, *forks]}) == 3
    assert pool.free_pages == 8 - 4


def test_append_after_a_fork_at_a_page_boundary_copies_nothing():
    pool = PagePool(4, page_size=4)
    table = filled(pool, 4)
    fork = pool.fork(table)
    assert pool.append([table, fork], [1, 1]) == []
    assert table.pages[0] == fork.pages[0] and table.pages[1] != fork.pages[1]


def test_a_fork_whose_origin_is_released_costs_nothing():
    pool = PagePool(2, page_size=4)
    table = filled(pool, 6)
    fork = pool.fork(table)
    pool.release(table)
    assert pool.append([fork], [1]) == []
    assert pool.free_pages == 0


def test_adopt_takes_the_pages_over_and_releases_its_own():
    pool = PagePool(8, page_size=4)
    line = filled(pool, 6)
    thread = pool.fork(line)
    pool.append([thread], [4])
    pages = thread.pages[:]
    pool.adopt(line, thread)
    assert (line.pages, line.length) == (pages, 10)
    assert (list(thread.pages), thread.length) == ([], 0)
    assert pool.free_pages == 8 - 3
    pool.adopt(line, line)
    assert (line.pages, line.length) == (pages, 10)


def test_release_twice_frees_once():
    pool = PagePool(2, page_size=4)
    table = filled(pool, 5)
    pool.release(table)
    pool.release(table)
    assert pool.free_pages == 2
    assert sorted(filled(pool, 8).pages) == [0, 1]


def test_out_of_pages_changes_nothing():
    pool = PagePool(4, page_size=4)
    a = filled(pool, 6)
    b = pool.fork(a)
    c = PageTable()
    before = state(pool, a, b, c)
    with pytest.raises(OutOfPages, match="3 pages are needed, 2 are free"):
        pool.append([a, b, c], [1, 1, 5])  # one copy of the page that both share, two new pages
    assert state(pool, a, b, c) == before
    pool.append([a, b, c], [1, 1, 4])
    assert pool.free_pages == 0


@pytest.mark.parametrize(
    "counts, message",
    [([1], "1 counts were given for 2 tables"), ([1, -1], "counts hold -1")],
)
def test_counts_that_do_not_fit_are_refused(counts, message):
    pool, tables = PagePool(4, 4), [PageTable(), PageTable()]
    with pytest.raises(ValueError, match=message):
        pool.append(tables, counts)
    assert pool.free_pages == 4


def test_a_table_twice_in_one_append_is_refused():
    table = PageTable()
    with pytest.raises(ValueError, match="a table stands twice"):
        PagePool(4, 4).append([table, table], [1, 1])


@pytest.mark.parametrize("num_pages, page_size, name", [(0, 4, "num_pages"), (4, 0, "page_size")])
def test_a_pool_without_pages_is_refused(num_pages, page_size, name):
    with pytest.raises(ValueError, match=f"{name} is 0: it must be at least 1"):
        PagePool(num_pages, page_size)


def test_one_token_for_512_sequences_takes_a_few_milliseconds_at_most():
    pool = PagePool(8192, page_size=16)
    tables = [filled(pool, 100 + i % 16) for i in range(512)]
    ones = [1] * 512
    times = []
    for _ in range(50):
        start = perf_counter()
        pool.append(tables, ones)
        times.append(perf_counter() - start)
    # The fastest, and room for a slow machine: 0.4 ms on a Xeon.
    assert min(times) < 1e-2


class PagePoolMachine(RuleBasedStateMachine):
    """Any sequence of operations, beside lists of tokens that share nothing."""

    @initialize(num_pages=st.integers(1, 12), page_size=st.integers(1, 4))
    def start(self, num_pages, page_size):
        self.pool = PagePool(num_pages, page_size)
        self.device = SimulatedPages(num_pages, page_size)
        self.tables: list[PageTable] = [PageTable()]
        self.contents: list[list[int]] = [[]]
        self.next_token = 0

    def pick(self, data) -> int:
        assume(self.tables)
        return data.draw(st.integers(0, len(self.tables) - 1))

    @rule()
    def allocate(self):
        self.tables.append(PageTable())
        self.contents.append([])

    @rule(data=st.data())
    def append(self, data):
        chosen = data.draw(st.sets(st.integers(0, len(self.tables) - 1))) if self.tables else []
        chosen = data.draw(st.permutations(sorted(chosen)))
        counts = data.draw(st.lists(st.integers(0, 6), min_size=len(chosen), max_size=len(chosen)))
        tables = [self.tables[i] for i in chosen]
        before = state(self.pool, *self.tables)
        try:
            copies = self.pool.append(tables, counts)
        except OutOfPages:
            assert state(self.pool, *self.tables) == before
            return
        writes = []
        for i, table, count in zip(chosen, tables, counts, strict=True):
            tokens = list(range(self.next_token, self.next_token + count))
            self.next_token += count
            self.contents[i] = self.contents[i] + tokens
            writes.append((table, tokens))
        self.device.run(copies, writes)
        held = Counter(page for table in self.tables for page in table.pages)
        for table, tokens in writes:
            first = (table.length - len(tokens)) // self.pool.page_size
            assert not tokens or all(held[page] == 1 for page in table.pages[first:])

    @rule(data=st.data())
    def fork(self, data):
        i = self.pick(data)
        free = self.pool.free_pages
        self.tables.append(self.pool.fork(self.tables[i]))
        self.contents.append(self.contents[i])
        assert self.pool.free_pages == free

    @rule(data=st.data())
    def adopt(self, data):
        i, j = self.pick(data), self.pick(data)
        self.pool.adopt(self.tables[i], self.tables[j])
        self.contents[i] = self.contents[j]
        if i != j:
            self.contents[j] = []

    @rule(data=st.data())
    def release(self, data):
        i = self.pick(data)
        self.pool.release(self.tables[i])
        self.contents[i] = []
        if data.draw(st.booleans()):
            del self.tables[i], self.contents[i]

    @rule(data=st.data())
    def drop_last(self, data):
        i = self.pick(data)
        assume(self.contents[i])
        self.pool.drop_last(self.tables[i])
        self.contents[i] = self.contents[i][:-1]

    @rule()
    def refuse_more_than_there_is(self):
        table = PageTable()
        before = state(self.pool)
        with pytest.raises(OutOfPages):
            self.pool.append([table], [self.pool.free_pages * self.pool.page_size + 1])
        assert state(self.pool) == before

    @rule()
    def use_all_there_is(self):
        table = PageTable()
        self.pool.append([table], [self.pool.free_pages * self.pool.page_size])
        assert self.pool.free_pages == 0
        self.pool.release(table)

    @invariant()
    def tables_show_their_own_tokens(self):
        for table, content in zip(self.tables, self.contents, strict=True):
            assert self.device.read(table) == content

    @invariant()
    def every_page_is_free_once_or_held(self):
        held = {page for table in self.tables for page in table.pages}
        assert all(len(set(table.pages)) == len(table.pages) for table in self.tables)
        assert self.pool.free_pages == self.pool.num_pages - len(held)

    @invariant()
    def no_table_holds_more_pages_than_it_needs(self):
        for table in self.tables:
            assert len(table.pages) == -(-table.length // self.pool.page_size)

    def teardown(self):
        for table in self.tables:
            self.pool.release(table)
        assert self.pool.free_pages == self.pool.num_pages
        assert sorted(filled(self.pool, self.pool.num_pages * self.pool.page_size).pages) == list(
            range(self.pool.num_pages)
        )


TestPagePoolMachine = PagePoolMachine.TestCase
TestPagePoolMachine.settings = settings(deadline=None, max_examples=60, stateful_step_count=30)
