"""bench.decode: its --quick form, its check, and its peers, some as stand-ins."""

import sys
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.nn.attention import varlen

from bench import decode, shapes
from bench import decode_peers as peers
from bench.decode_setup import PAGE_SIZE, DecodeSetup, Problem
from bench.graphs import replayed
from bench.running import suite_main
from bench.suite import Options, Peer, Skip
from tests.bench.schema import ONCE, checked_rows
from tests.bench.stand_ins import Cascade, varlen_attn
from tw_kernels import trie_decode

TREE = shapes.tree_of_thoughts("sorting128ToT", 17)


def _decode(case, heads=4, kv_heads=2, window=None):
    return DecodeSetup(Problem(case, "cpu", (heads, kv_heads, 32), window), torch.bfloat16)


def test_bench_decode_quick(tmp_path):
    assert suite_main(decode.SUITE, [*ONCE, "--json", str(tmp_path / "d.json")]) == 0
    rows = checked_rows(tmp_path / "d.json", decode.SUITE)
    for row in rows:
        if row["status"] == "skipped":
            assert row["reason"] == "the automatic choice"
            continue
        assert row["tflops"] > 0 and row["gb_per_s"] > 0 and row["roofline"] > 0
        assert row["of_floor"] == pytest.approx(row["ms"] / row["floor_ms"])
        assert row["unshared_kv_bytes"] == row["sharing"] * row["unique_kv_bytes"]
        if row["ours"]:
            assert row["plan_us"] > 0 and row["backend"] == "native"
            assert 1 <= row["kv_memory"] <= 1.1


@pytest.mark.parametrize("wrong", ["key", "page", "head"])
@pytest.mark.parametrize("dtype", decode.DTYPES)
def test_the_decode_check_catches_one_wrong_key_page_or_head(wrong, dtype):
    problem = Problem(shapes.fork(2, 3, 40, 12), "cpu", (4, 2, 32))
    setup = DecodeSetup(problem, dtype)
    q, k, v = setup.inputs(0)
    paging = problem.paging(PAGE_SIZE)
    kv = setup.pages(paging, k, v, new=True)
    plan, _ = setup.plan(paging, share=True)
    assert setup.check("planted", trie_decode(q, kv, plan), 0) is None
    if wrong == "key":  # no sequence sees another's new token
        table, end = paging.tables[3], problem.lengths[3] - 1
        other = problem.nodes[4][-1]
        kv.k_pages[table[end // 16], end % 16] = k[other]
        kv.v_pages[table[end // 16], end % 16] = v[other]
    if wrong == "page":
        first, second = paging.tables[0][:2]
        kv.k_pages[[first, second]] = kv.k_pages[[second, first]]
    out = trie_decode(q, kv, plan)
    if wrong == "head":
        out = out[:, [1, 0, 2, 3]]
    assert "off by" in (setup.check("planted", out, 0) or "")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_decode_sweeps_the_threads_of_one_rollout(device):
    names = [case.name for case in decode.cases(Options(device=device))]
    assert [f"fork-1x{threads}-8192+128" for threads in (1, 2, 4, 8, 16)] == names[:5]
    assert len(set(names)) == len(names)


def test_decode_work_is_of_every_pair_and_of_each_key_and_value_once():
    setup = _decode(shapes.fork(2, 3, 300, 20))
    q, k, v = setup.inputs(0)
    work = setup.work(decode.OURS)
    assert work.flops == 4 * 6 * 320 * 4 * 32 and len(k) == 300 + 6 * 20
    assert work.bytes == sum(x.nbytes for x in (q, k, v, q))


@pytest.mark.parametrize("window", [1, 25, 100, 10**6])
def test_a_window_of_decoding_hides_the_same_keys_from_every_peer(window, monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    setup = _decode(shapes.fork(2, 3, 70, 20), window=window)
    ours = decode._prepare(setup, decode.OURS, share=True, backend=None)(0)
    assert setup.check(decode.OURS, ours, 0) is None
    assert setup.check(peers.VARLEN, peers._varlen(setup)(0), 0) is None
    for prepare in (peers._padded, peers._cascade):
        with pytest.raises(Skip, match="no window"):
            monkeypatch.setitem(sys.modules, "flashinfer", None)
            prepare(setup)
    # Its floor is of what is seen: own tokens of 6 sequences, then the shared ones once.
    shared = max(0, min(window, 90) - 20)
    assert setup.figures(decode.OURS, 1)["unique_kv_bytes"] == setup.kv_bytes(
        6 * min(window, 20) + shared
    )
    assert setup.work(decode.OURS).flops == 4 * 6 * min(window, 90) * 4 * 32
    wider = _decode(shapes.fork(2, 3, 70, 20), window=window + 1)
    if window < 90:
        wrong = decode._prepare(wider, decode.OURS, share=True, backend=None)(0)
        assert "off by" in (setup.check("planted", wrong, 0) or "")


class Graph:
    """Stands for torch.cuda.CUDAGraph: runs nothing; counts replays."""

    def __init__(self):
        self.replays = 0

    def replay(self):
        self.replays += 1


@pytest.mark.parametrize("fault", [None, "waits", "other"])
def test_a_step_on_cuda_is_replayed_from_a_graph_or_called_if_it_cannot_be(fault, monkeypatch):
    made, calls, modes, captures = [], [], ["default"], fault is None

    @contextmanager
    def graph(graph):
        assert fault != "waits"  # a capture that fails leaves PyTorch unfit for others
        if not captures:
            raise RuntimeError("operation not permitted when stream is capturing")
        made.append(graph)
        yield

    def run(i):
        if modes[-1] == "error" and fault == "waits":
            raise RuntimeError("called a synchronizing CUDA operation")
        calls.append(i)
        return f"result {i}"

    for name, stand_in in {
        "get_sync_debug_mode": lambda: modes[-1],
        "set_sync_debug_mode": modes.append,
        "Stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
        "current_stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
        "stream": lambda stream: nullcontext(),
        "CUDAGraph": Graph,
        "graph": graph,
        "synchronize": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    setup = SimpleNamespace(device="cuda", input_sets=3, measured={})
    peer = Peer("one", lambda setup: run, ours=True)
    call = replayed(peer).prepare(setup)
    assert setup.measured == {"one": {"graph": captures}} and modes[-1] == "default"
    before = len(calls)
    assert [call(i) for i in (0, 1, 2, 1)] == ["result 0", "result 1", "result 2", "result 1"]
    if captures:
        assert [g.replays for g in made] == [1, 2, 1] and len(calls) == before
    else:
        assert calls[before:] == [0, 1, 2, 1]


@pytest.mark.parametrize("case", [shapes.fork(2, 3, 300, 20), TREE], ids=lambda case: case.name)
def test_paged_varlen_reads_each_sequences_own_pages(case, monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    setup = _decode(case)
    assert setup.check(peers.VARLEN, peers._varlen(setup)(0), 0) is None


@pytest.mark.parametrize(
    "case",
    [shapes.fork(2, 3, 300, 20), shapes.fork(1, 1, 40, 5), TREE],
    ids=lambda case: case.name,
)
def test_the_cascade_plan_computes_each_sequences_attention(case, monkeypatch):
    stand_in = SimpleNamespace(MultiLevelCascadeAttentionWrapper=Cascade)
    monkeypatch.setitem(sys.modules, "flashinfer", stand_in)
    assert peers._why_no_cascade("cuda") is None
    setup = _decode(case)
    assert setup.check(peers.CASCADE, peers._cascade(setup)(0), 0) is None


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=12), min_size=1, max_size=9),
    st.integers(1, 4),
)
def test_a_cascade_reads_each_page_once_and_gives_each_sequence_all_of_its_own(texts, page_size):
    # A live sequence ends in a new token of its own.
    paths = [[*text, 100 + i] for i, text in enumerate(texts)]
    problem = Problem(shapes.Case("random", lambda: paths), "cpu", (1, 1, 8))
    paging = problem.paging(page_size)
    levels = peers.cascade(paging, problem.lengths)
    read = [page for groups in levels for group in groups for page in group.pages]
    assert sorted(read) == list(range(paging.num_pages))
    tables, tokens = ([[] for _ in paths], [0] * len(paths))
    for groups in levels:
        ends = [0, *(group.end for group in groups)]
        assert [group.first for group in groups] == ends[:-1] and ends[-1] == len(paths)
        for group in groups:
            for s in range(group.first, group.end):
                tables[s] += group.pages
                tokens[s] += max(0, len(group.pages) - 1) * page_size + group.last_len
    assert tables == [table.tolist() for table in paging.tables]
    assert tokens == problem.lengths
