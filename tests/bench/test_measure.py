"""measure: only right peers are timed, all peers alike; and what meters and rooflines return."""

import itertools
import statistics
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import meter
from bench.measure import measure
from bench.meter import CpuMeter, CudaMeter
from bench.roofline import Work, measure_roofline, rates
from bench.suite import Peer, Skip
from tests.bench.conftest import ROOFLINE
from tests.bench.doubling import Doubling, counted


def _rows(*peers):
    rows = measure(Doubling(), list(peers), CpuMeter(), 2.0, ROOFLINE, lambda *_: None)
    return {row["peer"]: row for row in rows}


def test_a_wrong_peer_is_reported_wrong_and_never_timed():
    right, right_calls = counted(lambda x: 2 * x)
    # Right on the first inputs: every set that is timed must be checked.
    wrong, wrong_calls = counted(lambda x: 3 * x)
    rows = _rows(Peer("right", right), Peer("planted", wrong))
    assert rows["planted"]["status"] == "wrong"
    assert rows["planted"]["reason"] == "3 is not 2 (inputs 1)"
    assert rows["planted"]["ms"] is None and "rate" not in rows["planted"]
    assert wrong_calls == [0, 1]
    assert rows["right"]["status"] == "ok" and rows["right"]["ms"] > 0
    assert rows["right"]["rate"] > 0 and len(right_calls) > 2


def test_an_absent_peer_says_why_and_a_failing_one_does_not_stop_the_others():
    def absent(_setup):
        raise Skip("not installed")

    def failing(_setup):
        raise RuntimeError("no such kernel\nmore lines")

    right, _ = counted(lambda x: 2 * x)
    rows = _rows(Peer("absent", absent), Peer("failing", failing), Peer("right", right))
    assert (rows["absent"]["status"], rows["absent"]["reason"]) == ("skipped", "not installed")
    assert rows["failing"]["status"] == "failed"
    assert rows["failing"]["reason"] == "RuntimeError: no such kernel"
    assert rows["right"]["status"] == "ok"


def test_memory_that_runs_out_when_all_peers_hold_theirs_costs_that_peer_alone():
    def prepare(_setup):
        calls = []

        def call(i):
            calls.append(i)
            if len(calls) > 2:  # both sets of inputs were right
                raise torch.OutOfMemoryError("CUDA out of memory")
            return 2 * i

        return call

    right, _ = counted(lambda x: 2 * x)
    rows = _rows(Peer("large", prepare), Peer("right", right))
    assert rows["large"]["status"] == "skipped" and "does not fit" in rows["large"]["reason"]
    assert rows["large"]["ms"] is None and rows["right"]["status"] == "ok"
    assert rows["right"]["ratios"] == {}


def test_ratios_are_of_the_times_to_every_other_peer_that_was_timed():
    def absent(_setup):
        raise Skip("not here")

    right, _ = counted(lambda x: 2 * x)
    wrong, _ = counted(lambda x: 3 * x)
    slow, _ = counted(lambda x: time.sleep(2e-3) or 2 * x)
    rows = _rows(
        Peer("fast", right), Peer("slow", slow), Peer("wrong", wrong), Peer("absent", absent)
    )
    ms = {peer: rows[peer]["ms"] for peer in ("fast", "slow")}
    assert rows["fast"]["ratios"] == {"slow": ms["slow"] / ms["fast"]}
    assert rows["slow"]["ratios"] == {"fast": ms["fast"] / ms["slow"]}
    assert rows["fast"]["ratios"]["slow"] > 1
    assert "ratios" not in rows["wrong"] and "ratios" not in rows["absent"]


def test_each_action_is_shown_before_it_and_never_during_a_sample():
    shown: list[tuple[str, float | None]] = []
    measuring = False

    class Meter(CpuMeter):
        def seconds(self, call, calls):
            nonlocal measuring
            measuring = True
            try:
                return super().seconds(call, calls)
            finally:
                measuring = False

    def show(what, seconds):
        assert not measuring
        shown.append((what, seconds))

    def right(_setup):
        assert shown[-1][0] == "preparing right"
        return lambda x: time.sleep(2e-3) or 2 * x

    wrong, _ = counted(lambda x: 3 * x)
    peers = [Peer("right", right), Peer("wrong", wrong)]
    rows = measure(Doubling(), peers, Meter(), 2.0, ROOFLINE, show)
    repeats = rows[0]["repeats"]
    assert [what for what, _ in shown] == [
        "preparing right",
        *["checking right"] * 2,
        "preparing wrong",
        *["checking wrong"] * 2,
        "measuring the memory of right",
        "warming up right",
        *(f"timing right, round {i}/{repeats}" for i in range(1, repeats + 1)),
    ]
    assert {seconds is None for what, seconds in shown if what.startswith("timing")} == {False}


def test_a_row_keeps_its_samples():
    right, _ = counted(lambda x: 2 * x)
    row = _rows(Peer("right", right))["right"]
    assert len(row["samples_ms"]) == row["repeats"] >= 3
    assert all(float(f"{ms:.4g}") == ms > 0 for ms in row["samples_ms"])
    assert statistics.median(row["samples_ms"]) == pytest.approx(row["ms"], rel=1e-3)


def test_repeats_are_interleaved_and_inputs_rotate():
    order = []

    def peer(name):
        def prepare(_setup):
            def call(inputs):
                order.append((name, inputs))
                torch.mm(torch.ones(300, 300), torch.ones(300, 300))
                return 2 * inputs

            return call

        return Peer(name, prepare)

    _rows(peer("a"), peer("b"))
    names = "".join(name for name, _ in order[8:])  # after the checks and the warm-up
    assert "ab" in names and "ba" in names
    for name in "ab":
        inputs = [i for n, i in order if n == name]
        assert all(a != b for a, b in itertools.pairwise(inputs[2:]))


def test_rates_and_share_follow_from_the_counted_work():
    # 1 s at 1 TFLOP/s of 2 bounds it by the half, 8 GB/s of 10 by four fifths: the larger holds.
    both = rates(Work(flops=10**12, bytes=8 * 10**9, dtype="bfloat16"), 1.0, ROOFLINE)
    assert both["flops"] == 10**12 and both["bytes"] == 8 * 10**9
    assert (both["tflops"], both["gb_per_s"], both["roofline"]) == (1.0, 8.0, 0.8)
    assert rates(Work(flops=10**12), 4.0, ROOFLINE)["roofline"] == 0.25
    assert "gb_per_s" not in rates(Work(flops=10**12), 4.0, ROOFLINE)


def test_the_rate_of_a_product_is_at_least_that_of_float32():
    emulating = {"copy_gb_per_s": 10.0, "matmul_tflops": {"float32": 1.0, "bfloat16": 0.01}}
    row = rates(Work(flops=10**12, dtype="bfloat16"), 2.0, emulating)
    assert row["roofline"] == 0.5


def test_a_row_without_counted_work_has_no_share():
    right, _ = counted(lambda x: 2 * x)
    row = _rows(Peer("right", right))["right"]
    assert not {"flops", "bytes", "tflops", "gb_per_s", "roofline"} & set(row)


def test_the_roofline_is_a_rate_of_each_dtype_and_of_a_copy():
    roofline = measure_roofline(CpuMeter(), quick=True)
    assert set(roofline["matmul_tflops"]) == {"float32", "bfloat16"}
    # The slowest machine that this runs on, and the fastest.
    assert 0.1 < roofline["copy_gb_per_s"] < 1e4
    assert all(1e-4 < rate < 1e3 for rate in roofline["matmul_tflops"].values())


def test_peak_memory_is_what_a_call_holds_at_once():
    peak = CpuMeter().peak_bytes(lambda: torch.ones(8_000_000).sum())
    if peak is None:
        pytest.skip("no /proc/self/clear_refs here")
    assert 24e6 < peak < 64e6  # 32 MB, and what else the process does


def test_a_cache_is_flushed_by_reading(monkeypatch):
    """The timed call would pay for the writing back of what was written."""

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            order.append("event")

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 3.0

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            written = [result] if isinstance(result, torch.Tensor) else []
            order.append(max(x.nbytes for x in written))
            read.append(max(x.nbytes for x in args if isinstance(x, torch.Tensor)))
            return result

    order, read = [], []
    monkeypatch.setattr(CudaMeter, "device", "cpu")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(meter, "FLUSH_BYTES", 2**20)
    cuda = CudaMeter()
    with Calls():
        assert cuda.seconds(lambda: order.append("call"), 2) == 3e-3
    assert read == [2**20] * 2  # more than the cache holds, and next to nothing written
    assert order == [4, "event", "call", "event"] * 2
