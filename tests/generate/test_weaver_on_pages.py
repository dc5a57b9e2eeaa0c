"""A Weaver and a PagePool together: an engine that trusts the requests and compares no ids."""

from hypothesis import given
from hypothesis import strategies as st
from rollouts import CODEC, RandomModel, ids, randoms, unhurried
from simulated_pages import SimulatedPages

from threadweaver.generate import RequestId, Weaver
from threadweaver.generate.pages import PagePool, PageTable

PROMPT = ids("1ab\n" * 5)
NUM_PAGES = 4096


class PagedRollout:
    """Decodes a Weaver's requests, each on the table that its fields say, and checks the pages."""

    def __init__(self, weaver: Weaver, page_size: int):
        self.weaver = weaver
        self.pool = PagePool(NUM_PAGES, page_size)
        self.device = SimulatedPages(NUM_PAGES, page_size)
        self.tables: dict[RequestId, PageTable] = {}
        self.prefilled = 0
        self._open()

    def _open(self) -> None:
        for request in self.weaver.requests():
            if request.id in self.tables:
                continue
            parent = self.tables[request.parent] if request.parent else PageTable()
            table = self.tables[request.id] = self.pool.fork(parent)
            self.prefilled += len(request.context) - table.length
            self._append(table, request.context[table.length :])
            assert self.device.read(table) == request.context
        needed = {request.id for request in self.weaver.requests()} | self.weaver.retained()
        for id in self.tables.keys() - needed:
            self.pool.release(self.tables.pop(id))

    def _append(self, table: PageTable, tokens: list[int]) -> None:
        self.device.run(self.pool.append([table], [len(tokens)]), [(table, tokens)])

    def run(self, model: RandomModel, random) -> None:
        while not self.weaver.done:
            request = random.choice(self.weaver.requests())
            completion = model(request)
            self._append(self.tables[request.id], completion.tokens)
            assert self.device.read(self.tables[request.id]) == request.context + completion.tokens
            self.weaver.complete(request, *completion)
            self._open()


@unhurried
@given(randoms, st.integers(1, 3), st.sampled_from([1, 4, 16]))
def test_tables_mapped_by_the_requests_hold_their_contexts(random, max_depth, page_size):
    weaver = Weaver(PROMPT, CODEC, 2000, max_depth=max_depth)
    rollout = PagedRollout(weaver, page_size)
    rollout.run(RandomModel(random), random)
    assert rollout.tables == {} and rollout.pool.free_pages == NUM_PAGES


def test_a_join_prefills_threads_2_to_n_and_the_newline_alone():
    weaver = Weaver(PROMPT, CODEC, 1000)
    rollout = PagedRollout(weaver, page_size=4)
    assert rollout.prefilled == len(PROMPT)

    def complete(text: str) -> int:
        before, request = rollout.prefilled, weaver.requests()[0]
        rollout._append(rollout.tables[request.id], ids(text))
        weaver.complete(request, ids(text), "stop")
        rollout._open()
        return rollout.prefilled - before

    outlines = "".join(f"<Outline>{n}:</Outline>" for n in (1, 2, 3))
    assert complete(f"a<Parallel><Outlines>{outlines}</Outlines>") == 3 * len(ids("\n<Thread>\n1:"))
    assert complete("ab1ab</Thread>") == 0
    assert complete("a</Thread>") == 0
    assert complete("</Thread>") == len(ids("<Thread>\n2:a</Thread><Thread>\n3:</Thread>\n"))
    assert complete("</Parallel><eos>") == 0
    assert rollout.pool.free_pages == NUM_PAGES
