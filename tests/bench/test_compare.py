"""bench compare: noise is not a regression, and a regression is not noise."""

import itertools
import json
import math
import os
import random
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from bench import attention, attention_setup, shapes
from bench.__main__ import main
from bench.attention_peers import CAUSAL, DENSE
from bench.compare import compare, verdict
from bench.measure import measure
from bench.meter import CpuMeter
from bench.record import Record, RecordError, read_record

TOLERANCE = 0.1


def timed(samples):
    low, median, high = np.percentile(samples, (25, 50, 75)).tolist()
    return {"ms": median, "iqr_ms": high - low, "repeats": len(samples), "samples_ms": samples}


def run(tmp_path, times, noise=0.03, drift=1.0, seed=0, repeats=20, env=()):
    """A record whose rows have samples around `times[setup, peer]`, of this relative noise, some of
    them much slower, as on a machine that does other things too."""
    rng = random.Random(seed)
    rows = []
    for (case, peer), ms in times.items():
        busy = (rng.choice((0, 0, 0, rng.random())) for _ in range(repeats))
        samples = [ms * drift * (math.exp(rng.gauss(0, noise)) + wait) for wait in busy]
        row = {"case": case, "dtype": "float32", "peer": peer, "ours": peer.startswith("ours")}
        rows.append(row | {"status": "ok", "reason": None} | timed(samples))
    env = {"benchmark": "attention", "device": "some CPU", "threads": 2, **dict(env)}
    return Record(tmp_path / f"{seed}.json", env, rows)


TIMES = {
    (f"case-{n}", peer): n * ms
    for n in range(1, 9)
    for peer, ms in (("ours", 1.0), ("ours: other", 2.0), ("dense", 4.0), ("causal", 3.0))
}


def slower(times, factor, peer="ours", cases=None):
    """The times with some of our rows slower."""
    chosen = {(case, p) for case, p in times if p == peer and (cases is None or case in cases)}
    return {at: ms * factor if at in chosen else ms for at, ms in times.items()}


def is_regression(a, b, tolerance=TOLERANCE):
    return verdict(compare(a, b), tolerance).startswith("Regression")


@pytest.mark.parametrize("drift", [0.8, 1.0, 1.25])
@pytest.mark.parametrize("noise", [0.01, 0.05, 0.2])
def test_two_runs_of_the_same_code_are_not_a_regression_however_the_machine_drifts(
    tmp_path, noise, drift
):
    runs = [run(tmp_path, TIMES, noise, drift if i % 2 else 1.0, i) for i in range(10)]
    assert not any(itertools.starmap(is_regression, itertools.permutations(runs, 2)))


def without_samples(record):
    """As files were before they had samples."""
    rows = [{k: v for k, v in row.items() if k != "samples_ms"} for row in record.rows]
    return record._replace(rows=rows)


@pytest.mark.parametrize("drift", [0.9, 1.0, 1.1])
def test_a_slow_down_by_three_tenths_is_caught_in_all_setups_and_in_one(tmp_path, drift):
    for cases in (None, {"case-3"}, {f"case-{n}" for n in range(1, 5)}):
        for seed in range(10):
            a = run(tmp_path, TIMES, 0.01, seed=seed)
            b = run(tmp_path, slower(TIMES, 1.3, cases=cases), 0.01, drift, seed=100 + seed)
            assert is_regression(a, b), (cases, seed)


def test_files_without_samples_are_compared_by_their_medians(tmp_path):
    a, same = (without_samples(run(tmp_path, TIMES, seed=seed)) for seed in (1, 2))
    slow = run(tmp_path, slower(TIMES, 1.3), seed=3)
    assert is_regression(a, without_samples(slow)) and not is_regression(a, same)
    medians = {row["ms"] for row in a.rows}
    assert {c.before for c in compare(a, slow).changes} == medians | {None}


def test_a_slow_down_that_no_row_shows_alone_shows_in_all_together(tmp_path):
    a = run(tmp_path, TIMES, noise=0.12, repeats=5, seed=2)
    b = run(tmp_path, slower(TIMES, 1.3), noise=0.12, repeats=5, seed=3)
    slow = [c for c in compare(a, b).changes if c.ours and c.slower(TOLERANCE)]
    assert [(c.peer, c.setup) for c in slow] == [("ours", "median of 8 setups")]


def test_within_the_tolerance_is_no_regression_and_without_one_it_is(tmp_path):
    a, b = run(tmp_path, TIMES, 0.002, seed=1), run(tmp_path, slower(TIMES, 1.2), 0.002, seed=2)
    assert is_regression(a, b) and not is_regression(a, b, tolerance=0.3)


def test_a_peer_that_is_not_ours_may_become_slower(tmp_path):
    a, b = run(tmp_path, TIMES, seed=1), run(tmp_path, slower(TIMES, 2, peer="dense"), seed=2)
    assert not is_regression(a, b)


def test_drift_is_what_the_other_peers_of_the_setup_did(tmp_path):
    a = run(tmp_path, TIMES, noise=0, seed=1)
    b = run(tmp_path, {at: ms * (1.5 if at[0] == "case-2" else 1) for at, ms in TIMES.items()}, 0)
    changes = {(c.setup, c.peer): c for c in compare(a, b).changes}
    assert changes["case-2", "ours"].drift == pytest.approx(1.5)
    assert changes["case-3", "ours"].drift == pytest.approx(1)
    assert all(c.change == pytest.approx(1) for c in changes.values())


def test_a_file_of_ours_alone_has_no_drift(tmp_path):
    times = {at: ms for at, ms in TIMES.items() if at[1].startswith("ours")}
    changes = compare(run(tmp_path, times, seed=1), run(tmp_path, times, seed=2)).changes
    assert {c.drift for c in changes} == {1.0}


@pytest.mark.parametrize("status", ["wrong", "failed"])
def test_a_row_that_is_no_longer_right_is_a_regression(tmp_path, status):
    a, b = run(tmp_path, TIMES, seed=1), run(tmp_path, TIMES, seed=2)
    b.rows[0] |= {"status": status, "reason": "dq is off", "ms": None}
    comparison = compare(a, b)
    assert comparison.broken == [f"attention case-1 ours: {status}: dq is off"]
    assert "1 no longer right" in verdict(comparison, TOLERANCE)
    # It was so before, or it is not ours: then it is no news.
    assert not is_regression(b, b)
    a.rows[2] |= {"status": "failed", "reason": "no memory", "ms": None}
    assert not is_regression(run(tmp_path, TIMES, seed=1), a)


def test_missing_rows_are_listed_and_are_no_regression(tmp_path):
    a, b = run(tmp_path, TIMES, seed=1), run(tmp_path, TIMES, seed=2)
    del b.rows[0]
    b.rows[0] |= {"status": "skipped", "reason": "not here", "ms": None}
    comparison = compare(a, b)
    assert comparison.missing == [
        "attention case-1 ours: only before",
        "attention case-1 ours: other: only before: skipped, not here",
    ]
    assert not is_regression(a, b)


def write(record, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"env": record.env, "rows": record.rows}))
    return path


def test_the_command_says_the_verdict_last_and_exits_with_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # a row a line
    a = write(run(tmp_path, TIMES, seed=1), tmp_path / "a" / "x.json")
    env = {"device": "another CPU"}
    b = write(run(tmp_path, slower(TIMES, 1.5), seed=2, env=env), tmp_path / "b" / "x.json")
    write(run(tmp_path, TIMES, seed=3), tmp_path / "b" / "alone.json")
    (tmp_path / "b" / "summary.json").write_text("{}")
    for arguments in ([a, a], [a.parent, a.parent], [a, b, "--tolerance", "2"]):
        assert main(["compare", *map(str, arguments)]) == 0
        assert capsys.readouterr().out.splitlines()[-1].startswith("No regression")
    for arguments in ([a, b], [a.parent, b.parent]):
        assert main(["compare", *map(str, arguments)]) == 1
        *lines, last = capsys.readouterr().out.splitlines()
        assert last.startswith("Regression: of ours, 9 of 18 slower by more than 10 %")
        assert any(line.startswith("warning:") and "another CPU" in line for line in lines)
        # Worst first: nothing above the first row of ours is faster than what is below it.
        changes = [float(line.split("│")[-4]) for line in lines if "│" in line]
        assert changes == sorted(changes, reverse=True)
    assert any("alone.json" in line for line in lines)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("none.json", "a.json", "none.json: No such file"),
        ("none", ".", "none: No such file or folder"),
        ("a.json", "broken.json", "broken.json: not JSON"),
        ("a.json", "deep.json", "deep.json: not a result: nested too deeply"),
        ("a.json", "pipe.json", "pipe.json: is a pipe"),
        ("a.json", "other.json", "other.json: not a result"),
        ("a.json", "decode.json", "holds decode: not comparable"),
        ("a.json", ".", "give two files or two folders"),
        (".", "empty", "empty: holds no result"),
        ("a.json", "--tolerance", "tolerance"),
    ],
)
def test_what_cannot_be_compared_exits_2_with_one_line(tmp_path, capsys, before, after, message):
    a = run(tmp_path, TIMES)
    write(a, tmp_path / "a.json")
    write(a._replace(env={**a.env, "benchmark": "decode"}), tmp_path / "decode.json")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "other.json").write_text('{"steps": []}')
    (tmp_path / "empty").mkdir()
    assert main(["compare", str(tmp_path / before), str(tmp_path / after)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ms", 0),
        ("ms", None),
        ("ms", float("nan")),
        ("iqr_ms", []),
        ("repeats", ""),
        ("repeats", [1]),
        ("samples_ms", [1.0, "2"]),
        ("peer", -1),
    ],
)
def test_a_row_that_cannot_be_read_is_named(tmp_path, capsys, field, value):
    record = run(tmp_path, TIMES)
    write(record, tmp_path / "a.json")
    record.rows[3][field] = value
    write(record, tmp_path / "b.json")
    for arguments in (
        ["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")],
        ["report", str(tmp_path), "--out", str(tmp_path / "report.md")],
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert f"b.json: row 4: {field} " in error and error.count("\n") == 1


def test_a_key_is_read_from_old_files_too(tmp_path):
    row = {"case": "a", "n": 4, "peer": "ours", "ours": True, "status": "ok"}
    row |= {"ms": 1.0, "iqr_ms": 0.0, "repeats": 1}
    env = {"benchmark": "decode", "device": "x"}
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"env": env, "rows": [row]}))
    assert read_record(path).setup(row) == (("case", "a"), ("n", 4))
    assert Record(path, {**env, "key": ["n"]}, [row]).setup(row) == (("n", 4),)
    with pytest.raises(RecordError, match="none"):
        read_record(tmp_path / "none.json")


def slowed(call, factor):
    """The call, which then waits until it has taken `factor` times as long."""

    def slow(inputs):
        start = time.perf_counter()
        result = call(inputs)
        end = time.perf_counter()
        while time.perf_counter() < start + factor * (end - start):
            pass
        return result

    return slow


@pytest.mark.slow  # and not in every run: it compares times
def test_a_slow_down_planted_in_real_attention_is_caught_and_five_repeats_are_not_flagged(tmp_path):
    """All in one measurement, interleaved: so the load of the machine that runs the tests, which
    comes and goes in seconds, is on all of them alike; of calls shorter than a time slice, and with
    a tolerance that such load does not reach. The first copy takes what memory was there before."""
    tolerance = 0.5
    by_name = {peer.name: peer for peer in attention.SUITE.peers}
    ours, others = by_name[attention_setup.OURS], [by_name[name] for name in (DENSE, CAUSAL)]
    factors = {"first": 1.0, **dict.fromkeys("abcdef", 1.0), "slow": 3.0}

    def copy(name):
        def prepare(setup):
            return slowed(ours.prepare(setup), factors[name])

        return replace(ours, name=name, prepare=prepare)

    cases = [shapes.pack(4, 64), shapes.trajectory(150, 1), shapes.trajectory(250, 1)]
    problems = [attention_setup.Problem(case, "cpu", 3, 3, 64) for case in cases]
    setups = [attention_setup.AttentionSetup(p, torch.float32, what="fwd") for p in problems]
    peers = [*map(copy, factors), *others]
    machine = {"matmul_tflops": {"float32": 1.0}, "copy_gb_per_s": 1.0}
    rows = [r for s in setups for r in measure(s, peers, CpuMeter(), 0.1, machine, lambda *_: None)]
    assert {row["status"] for row in rows} == {"ok"}

    def record(name):
        chosen = [r for r in rows if r["peer"] in (name, DENSE, CAUSAL)]
        renamed = [{**r, "peer": "ours"} if r["ours"] else r for r in chosen]
        env = {"benchmark": "attention", "device": "here", "key": list(setups[0].key)}
        return Record(tmp_path / name, env, renamed)

    runs = {name: record(name) for name in factors}
    slow, _ = runs.pop("slow"), runs.pop("first")
    assert not any(is_regression(a, b, tolerance) for a, b in itertools.pairwise(runs.values()))
    assert all(is_regression(run, slow, tolerance) for run in runs.values())
