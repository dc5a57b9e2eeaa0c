"""The frame and both benchmarks, in their --quick form."""

import functools
import itertools
import json
import re
import statistics
import time

import pytest
import torch
from transformers import Qwen3Config

from bench import attention, attention_setup, decode, frame, layout, rollout, shapes, train_step
from bench.frame import Options, Peer, Setup, Skip, Suite, main, measure
from bench.meter import CpuMeter
from bench.oracle import TOLERANCE, reference, worst_row
from bench.peers import CAUSAL, DENSE, UNROLLED_SDPA, visible
from bench.roofline import Work, measure_roofline, rates
from tests.bench.conftest import ROOFLINE
from threadweaver import model
from tw_kernels import trie_decode
from tw_kernels.attention import dense


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


ONCE = ["--quick", "--budget", "0.001"]  # what takes over 5 ms is timed once


class Doubling(Setup):
    """A setup whose right answer is 2 x, on two sets of inputs."""

    input_sets = 2
    closed = False

    @property
    def key(self):
        return {"case": "doubling"}

    def close(self):
        self.closed = True

    def check(self, peer, result, inputs):
        return None if result == 2 * inputs else f"{result} is not {2 * inputs}"

    def figures(self, peer, seconds):
        return {"rate": 1 / seconds}


@pytest.fixture
def two_layers(monkeypatch):
    """The models of train_step and rollout with no more than two: no claim needs their depth."""

    def config(**fields):
        return Qwen3Config(**{**fields, "num_hidden_layers": 2})

    def new_model(tokenizer, arch):
        return model.new_model(tokenizer, {**arch, "num_hidden_layers": 2})

    monkeypatch.setattr(train_step, "Qwen3Config", config)
    monkeypatch.setattr(rollout, "new_model", new_model)


def _counted(answer):
    calls = []

    def prepare(_setup):
        def call(inputs):
            calls.append(inputs)
            return answer(inputs)

        return call

    return prepare, calls


def _rows(*peers):
    rows = measure(Doubling(), list(peers), CpuMeter(), budget=0.01, roofline=ROOFLINE)
    return {row["peer"]: row for row in rows}


def test_a_wrong_peer_is_reported_wrong_and_never_timed():
    right, right_calls = _counted(lambda x: 2 * x)
    # Right on the first inputs: every set that is timed must be checked.
    wrong, wrong_calls = _counted(lambda x: 3 * x)
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

    right, _ = _counted(lambda x: 2 * x)
    rows = _rows(Peer("absent", absent), Peer("failing", failing), Peer("right", right))
    assert (rows["absent"]["status"], rows["absent"]["reason"]) == ("skipped", "not installed")
    assert rows["failing"]["status"] == "failed"
    assert rows["failing"]["reason"] == "RuntimeError: no such kernel"
    assert rows["right"]["status"] == "ok"


def test_ratios_are_of_the_times_to_every_other_peer_that_was_timed():
    def absent(_setup):
        raise Skip("not here")

    right, _ = _counted(lambda x: 2 * x)
    wrong, _ = _counted(lambda x: 3 * x)
    slow, _ = _counted(lambda x: time.sleep(2e-3) or 2 * x)
    rows = _rows(
        Peer("fast", right), Peer("slow", slow), Peer("wrong", wrong), Peer("absent", absent)
    )
    ms = {peer: rows[peer]["ms"] for peer in ("fast", "slow")}
    assert rows["fast"]["ratios"] == {"slow": ms["slow"] / ms["fast"]}
    assert rows["slow"]["ratios"] == {"fast": ms["fast"] / ms["slow"]}
    assert rows["fast"]["ratios"]["slow"] > 1
    assert "ratios" not in rows["wrong"] and "ratios" not in rows["absent"]


def test_what_comes_next_is_said_before_it_and_never_within_a_sample():
    said: list[tuple[str, float | None]] = []
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
        said.append((what, seconds))

    def right(_setup):
        assert said[-1][0] == "preparing right"
        return lambda x: time.sleep(2e-3) or 2 * x

    wrong, _ = _counted(lambda x: 3 * x)
    peers = [Peer("right", right), Peer("wrong", wrong)]
    rows = measure(Doubling(), peers, Meter(), 0.01, ROOFLINE, show)
    repeats = rows[0]["repeats"]
    assert [what for what, _ in said] == [
        "preparing right",
        *["checking right"] * 2,
        "preparing wrong",
        *["checking wrong"] * 2,
        "measuring the memory of right",
        "warming up right",
        *(f"timing right, round {i}/{repeats}" for i in range(1, repeats + 1)),
    ]
    assert {seconds is None for what, seconds in said if what.startswith("timing")} == {False}


def test_progress_goes_to_stderr_with_suite_case_and_peer(capsys, ticking_clock):
    right, _ = _counted(lambda x: time.sleep(2e-3) or 2 * x)
    suite = Suite("t", Options, lambda o: [Doubling()], [Peer("ours", right)])
    assert main(suite, ["--quick"]) == 0
    out, err = capsys.readouterr()
    assert re.search(r"^t doubling: timing ours, round \d+/\d+$", err, re.M)
    assert all(line.startswith("t doubling: ") for line in err.splitlines())
    assert "timing" not in out and "case doubling" in out


def test_quick_cases_leave_stderr_empty(capsys):
    right, _ = _counted(lambda x: 2 * x)
    suite = Suite("t", Options, lambda o: [Doubling()], [Peer("ours", right)])
    assert main(suite, ["--quick"]) == 0
    assert capsys.readouterr().err == ""


def test_a_row_keeps_its_samples():
    right, _ = _counted(lambda x: 2 * x)
    row = _rows(Peer("right", right))["right"]
    assert len(row["samples_ms"]) == row["repeats"] >= 3
    assert all(float(f"{ms:.4g}") == ms > 0 for ms in row["samples_ms"])
    assert statistics.median(row["samples_ms"]) == pytest.approx(row["ms"], rel=1e-3)


def test_a_setup_is_closed_even_when_a_peer_stops_the_run():
    def stop(_setup):
        raise KeyboardInterrupt

    setup = Doubling()
    with pytest.raises(KeyboardInterrupt):
        main(Suite("t", Options, lambda o: [setup], [Peer("stop", stop)]), ["--quick"])
    assert setup.closed


def test_rates_and_share_follow_from_the_counted_work():
    # 1 s at 1 TFLOP/s of 2 bounds it by the half, 8 GB/s of 10 by four fifths: the larger holds.
    both = rates(Work(flops=10**12, bytes=8 * 10**9, dtype="bfloat16"), 1.0, ROOFLINE)
    assert both["flops"] == 10**12 and both["bytes"] == 8 * 10**9
    assert (both["tflops"], both["gb_per_s"], both["roofline"]) == (1.0, 8.0, 0.8)
    assert rates(Work(flops=10**12), 4.0, ROOFLINE)["roofline"] == 0.25
    assert "gb_per_s" not in rates(Work(flops=10**12), 4.0, ROOFLINE)


def test_an_emulated_product_is_no_roof():
    emulating = {"copy_gb_per_s": 10.0, "matmul_tflops": {"float32": 1.0, "bfloat16": 0.01}}
    row = rates(Work(flops=10**12, dtype="bfloat16"), 2.0, emulating)
    assert row["roofline"] == 0.5


def test_a_row_that_nobody_counted_has_no_share():
    right, _ = _counted(lambda x: 2 * x)
    row = _rows(Peer("right", right))["right"]
    assert not {"flops", "bytes", "tflops", "gb_per_s", "roofline"} & set(row)


def test_the_roofline_is_a_rate_of_each_dtype_and_of_a_copy():
    roofline = measure_roofline(CpuMeter(), quick=True)
    assert set(roofline["matmul_tflops"]) == {"float32", "bfloat16"}
    # The slowest machine that this runs on, and the fastest.
    assert 0.1 < roofline["copy_gb_per_s"] < 1e4
    assert all(1e-4 < rate < 1e3 for rate in roofline["matmul_tflops"].values())


def test_an_absent_peer_has_no_rows_and_the_environment_says_why(tmp_path, capsys):
    right, _ = _counted(lambda x: 2 * x)
    absent = Peer("cuDNN", right, why_absent=lambda device: f"not on {device}")
    suite = Suite("t", Options, lambda o: [Doubling()], [Peer("right", right), absent])
    assert main(suite, ["--quick", "--json", str(tmp_path / "t.json")]) == 0
    record = json.loads((tmp_path / "t.json").read_text())
    assert record["env"]["absent"] == {"cuDNN": "not on cpu"}
    assert [row["peer"] for row in record["rows"]] == ["right"]
    assert main(suite, ["--quick", "--only", "peer=cuDNN"]) == 2
    assert "cuDNN: not on cpu" in capsys.readouterr().err


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


def test_peak_memory_sees_what_a_call_holds_at_once():
    peak = CpuMeter().peak_bytes(lambda: torch.ones(8_000_000).sum())
    if peak is None:
        pytest.skip("no /proc/self/clear_refs here")
    assert 31e6 < peak < 40e6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "case"], "--only: 'case' is not of the form KEY=GLOB"),
        (["--only", "colour=red"], "--only: layout has no key 'colour'"),
        (["--only", "case=nothing"], "nothing in layout matches"),
        (["--json", "/no/such/folder/x.json"], "--json: there is no folder"),
        (["--budget", "0"], "--budget is 0"),
        (["--device", "tpu"], "device"),
        (["--device", "cuda"], "--device cuda"),
    ],
)
def test_a_bad_option_exits_2_with_one_line(arguments, message, capsys):
    assert main(layout.SUITE, ["--quick", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_wrong_row_makes_the_command_exit_1(capsys):
    wrong, _ = _counted(lambda x: 2 * x + 1)
    suite = Suite("t", Options, lambda o: [Doubling()], [Peer("bad", wrong)])
    assert main(suite, ["--quick"]) == 1
    assert "bad" in capsys.readouterr().err


def _check_schema(path, suite):
    record = json.loads(path.read_text())
    assert set(record) == {"env", "rows"}
    env = record["env"]
    assert env["benchmark"] == suite.name and env["threads"] == 1
    assert {"device", "cpu", "versions", "commit", "dirty", "date"} <= set(env)
    assert env["roofline"]["copy_gb_per_s"] > 0
    peers = {row["peer"] for row in record["rows"]}
    assert peers | set(env["absent"]) == {peer.name for peer in suite.peers}
    for row in record["rows"]:
        assert list(row)[: len(env["key"]) + 1] == [*env["key"], "peer"]
        assert row["status"] in ("ok", "skipped"), row
        if row["status"] == "ok":
            assert row["ms"] > 0 and row["iqr_ms"] >= 0 and row["repeats"] >= 1
        else:
            assert row["ms"] is None and row["reason"]
    return record["rows"]


def test_bench_layout_quick(tmp_path, monkeypatch):
    monkeypatch.setattr(frame, "measure_roofline", measure_roofline)
    assert main(layout.SUITE, ["--quick", "--json", str(tmp_path / "l.json")]) == 0
    rows = _check_schema(tmp_path / "l.json", layout.SUITE)
    # A trie takes O(N): 28 bytes a token at every size, and 4 for each path.
    tries = [row for row in rows if row["peer"] == layout.OURS]
    assert all(28 <= row["bytes_per_token"] < 28.3 for row in tries)


def test_bench_attention_quick(tmp_path):
    path = tmp_path / "a.json"
    arguments = [*ONCE, "--only", "dtype=float32", "--json", str(path)]
    assert main(attention.SUITE, arguments) == 0
    rows = _check_schema(path, attention.SUITE)
    for row in rows:
        if row["peer"] in (attention_setup.OURS, DENSE, CAUSAL, UNROLLED_SDPA):
            assert row["status"] == "ok" and row["tflops"] > 0 and row["gb_per_s"] > 0
            assert row["of_causal"] > 0 and row["roofline"] > 0 and len(row["checked_heads"]) == 4
        if row["peer"] == attention_setup.OURS:
            assert row["backend"] in attention.TRIE_ATTENTION
        if row["peer"].startswith("Flex") and row["pass"] == "fwd+bwd":
            assert row["reason"] == "FlexAttention has no backward on a CPU"


def test_bench_decode_quick(tmp_path):
    assert main(decode.SUITE, [*ONCE, "--json", str(tmp_path / "d.json")]) == 0
    rows = _check_schema(tmp_path / "d.json", decode.SUITE)
    for row in rows:
        if row["status"] == "skipped":
            assert row["reason"] == "the automatic choice"
            continue
        assert row["tflops"] > 0 and row["gb_per_s"] > 0 and row["roofline"] > 0
        assert row["unshared_kv_bytes"] == row["sharing"] * row["unique_kv_bytes"]
        if row["ours"]:
            assert row["plan_us"] > 0 and row["backend"] == "native"
            assert 1 <= row["kv_memory"] <= 1.1


@pytest.mark.parametrize("wrong", ["key", "page", "head"])
@pytest.mark.parametrize("dtype", decode.DTYPES)
def test_the_decode_check_catches_one_wrong_key_page_or_head(wrong, dtype):
    problem = decode.Problem(shapes.fork(2, 3, 40, 12), "cpu", (4, 2, 32))
    setup = decode.DecodeSetup(problem, dtype)
    q, k, v = setup.inputs(0)
    paging = problem.paging(decode.PAGE_SIZE)
    kv = setup.pages(paging, k, v, new=True)
    plan = setup.plan("planted", paging, share=True)
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


def test_bench_train_step_quick_has_equal_gradients_and_less_work(tmp_path, two_layers):
    assert main(train_step.SUITE, [*ONCE, "--json", str(tmp_path / "t.json")]) == 0
    rows = _check_schema(tmp_path / "t.json", train_step.SUITE)
    for update in ("SFT", "P-GRPO"):
        by_peer = {row["peer"]: row for row in rows if row["update"] == update}
        assert set(by_peer) == {peer.name for peer in train_step.SUITE.peers}
        skipped = {name for name, row in by_peer.items() if row["status"] == "skipped"}
        assert skipped == ({train_step.PER_ROLLOUT} if update == "SFT" else set())
        ours, unrolled = by_peer[train_step.OURS], by_peer[train_step.UNROLLED]
        assert ours["token_ratio"] == unrolled["tokens"] / ours["tokens"] > 1.5
        assert ours["memory_of_packed"] < 1
        assert ours["of_ratio"] == ours["ratios"][train_step.UNROLLED] / ours["token_ratio"]
        assert ours["flops"] == unrolled["flops"]
        assert ours["tokens"] < by_peer[train_step.SHARED_PROMPT]["tokens"] < unrolled["tokens"]
        assert by_peer[train_step.PACKED]["tokens"] == unrolled["tokens"]


@pytest.mark.parametrize("wrong", ["weight", "order", "token"])
def test_the_train_step_check_catches_one_wrong_weight_order_or_token(wrong, two_layers):
    group = shapes.rollouts(3, blocks=1, threads=3, prompt=24, text=8, thread=(8, 16))
    setup = train_step.PolicyUpdate(group, "small", "cpu")
    setup.run(train_step.group_passes(setup))
    assert setup.check("ours", None, 0) is None
    last = setup.rollouts[1][-1]
    if wrong == "weight":
        setup.rollouts[1] = [c._replace(weight=c.weight + 1e-3) for c in setup.rollouts[1]]
    if wrong == "order":
        last.path[-3:-1] = last.path[-2], last.path[-3]
    if wrong == "token":
        last.path[-1] += 1
    setup.run(train_step.group_passes(setup))
    assert "off by" in (setup.check("planted", None, 0) or "")


def test_bench_rollout_quick_says_the_recorded_tokens_in_fewer_steps(tmp_path, two_layers):
    path = tmp_path / "r.json"
    assert main(rollout.SUITE, [*ONCE, "--dtype", "fp32", "--json", str(path)]) == 0
    rows = {(row["case"], row["peer"]): row for row in _check_schema(path, rollout.SUITE)}
    peers = [peer.name for peer in rollout.SUITE.peers]
    assert set(rows) == {
        (c, p) for c in ("fork-join-1", "multiplication", "mixed-8") for p in peers
    }
    skipped = {key for key, row in rows.items() if row["status"] == "skipped"}
    assert skipped == {("mixed-8", rollout.PARALLEL)}
    for case in ("fork-join-1", "multiplication"):
        parallel, sequential, generate, continuous = (rows[case, peer] for peer in peers)
        assert continuous["tokens"] == generate["tokens"] <= continuous["steps"] + 1
        assert sequential["steps"] == generate["steps"] == sequential["tokens"]
        assert parallel["latency_speedup"] > 1.2
        assert parallel["steps"] < sequential["steps"] / parallel["latency_speedup"] + 2
        assert (
            parallel["of_latency"]
            == parallel["ratios"][rollout.SEQUENTIAL] / (parallel["latency_speedup"])
        )
        for row in (parallel, sequential):
            assert sum(row[key] for key in row if key.endswith("_share")) == pytest.approx(1)
            assert row["max_mismatch"] <= 1e-4 and row["mean_mismatch"] <= 1e-5


def test_the_rollout_check_catches_one_wrong_token():
    language = rollout.Language("tiny", "fp32", "cpu")
    setup = rollout.RolloutSetup(rollout.mixed(2, 2, 16), language)
    responses = [list(t.response) for t in setup.trajectories]
    assert setup.check("planted", rollout.Said(responses, 1, []), 0) is None
    responses[1][3] += 1
    wrong = setup.check("planted", rollout.Said(responses, 1, []), 0)
    assert wrong == "request 1 did not get its recorded response"


def test_continuous_batching_is_checked_by_its_models_own_choice():
    language = rollout.Language("tiny", "fp32", "cpu")
    setup = rollout.RolloutSetup(rollout.mixed(2, 2, 16), language)
    try:
        said = rollout._continuous(setup)(0)
    finally:
        setup.close()
    assert setup.check(rollout.CONTINUOUS, said, 0) is None
    said.responses[1][3] = (said.responses[1][3] + 1) % 256
    assert "below the best" in (setup.check(rollout.CONTINUOUS, said, 0) or "")
    said.responses[1].pop()
    assert "request 1" in (setup.check(rollout.CONTINUOUS, said, 0) or "")


@pytest.mark.parametrize(
    ("option", "text", "message"),
    [
        ("--replay", None, "no such file"),
        ("--replay", "<Parallel><Outlines><Outline>1: a</Outline></Outlines>a", ":1: token"),
        ("--replay", "ab" * 1500, "over the model's context"),
        ("--model", None, "no model here"),
        ("--batch", "0", "--batch is 0"),
    ],
)
def test_bench_rollout_refuses_what_it_cannot_replay(option, text, message, tmp_path, capsys):
    path = tmp_path / "t.jsonl"
    if option == "--replay" and text:
        path.write_text(json.dumps({"question": "1", "response": text}) + "\n")
    value = text if option == "--batch" else str(path)
    assert main(rollout.SUITE, ["--quick", option, value]) == 2
    error = capsys.readouterr().err
    assert option in error and message in error and error.count("\n") == 1


def _setup(case, dtype=torch.float32, heads=4, kv_heads=2):
    problem = attention_setup.Problem(case, "cpu", heads, kv_heads, 32)
    return attention_setup.AttentionSetup(problem, dtype, backward=True)


@pytest.mark.parametrize("wrong", ["neighbour", "head", "nan"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_attention_check_catches_one_wrong_column_head_or_value(wrong, dtype):
    setup = _setup(shapes.trajectory(300, 2), dtype)
    q, k, v, dout = setup.inputs(0)
    mask = visible(setup.layout.subtree_ends)
    if wrong == "neighbour":  # one row sees one column that it should not
        row = 200
        mask[row, (~mask[row, :row]).nonzero()[0]] = True

    def attend(q, k, v):
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, enable_gqa=True
        )
        return out[0].transpose(0, 1)

    out, *grads = setup.run(attend, q, k, v, dout)
    if wrong == "head":
        out = out[:, [1, 0, 2, 3]]
    if wrong == "nan":
        out = out.clone()
        out[250, 3, 7] = float("nan")
    assert "off by" in (setup.check("planted", (out, *grads), 0) or "")


def test_the_reference_agrees_with_the_dense_backend_in_float64():
    setup = _setup(shapes.trajectory(1200, 3))  # more than two chunks, a ragged last one
    values = setup.problem.values[0]
    expected = reference(*values, setup.layout.subtree_ends, [0, 1])
    q, k, v, dout = (x.double() for x in values)
    plan = dense.plan(setup.layout, q)
    out, lse = dense.forward(q, k, v, plan, 32**-0.5)
    grads = dense.backward(dout, q, k, v, out, lse, plan, 32**-0.5)
    for got, name in zip((out, *grads), ("out", "dq", "dk", "dv"), strict=True):
        assert worst_row(got, getattr(expected, name)) < 1e-11, name
    assert TOLERANCE[torch.float32] < TOLERANCE[torch.bfloat16]


def test_the_layout_check_catches_a_moved_token_and_a_wrong_block():
    setup = layout.LayoutSetup(shapes.trajectory(512, 2))
    flat = layout.dict_trie(setup.case.paths)
    assert setup.check("planted", flat, 0) is None
    tokens = flat.tokens.clone()
    tokens[[3, 4]] = tokens[[4, 3]]
    assert setup.check("planted", flat._replace(tokens=tokens), 0) == "tokens differ"
    schedule = setup.case.trie.layout().block_schedule(layout.BLOCK_Q, layout.BLOCK_KV)
    assert setup.check("planted", schedule, 0) is None
    row = int((schedule.full_end > schedule.row_ptr[:-1]).nonzero()[0])
    full_end = schedule.full_end.clone()
    full_end[row] -= 1
    wrong = setup.check("planted", schedule._replace(full_end=full_end), 0)
    assert wrong == "the full blocks differ"


@pytest.mark.parametrize(
    "case",
    [
        shapes.star(1000),
        shapes.pack(8, 64),
        *(shapes.trajectory(n, blocks) for n, blocks in ((100, 1), (512, 2), (8192, 4))),
        shapes.tree_of_thoughts("sorting128ToT", 17),
        shapes.tree_of_thoughts("docmergeToT", 4),
    ],
    ids=lambda case: case.name,
)
def test_a_case_has_the_size_its_name_says(case):
    trie = case.trie
    name, _, size = case.name.partition("-")
    tree = functools.partial(shapes._trees().__getitem__, name)
    n = eval(size.replace("x", "*")) if name not in shapes._trees() else None
    assert len(trie) == (n or sum(tree()[int(size)]["sizes"]))
    assert not n or name != "star" or abs(trie.layout().density - 0.242) < 0.002


def test_the_long_trajectory_unrolls_to_194k():
    case = shapes.trajectory(34408, 6)
    assert len(case.trie) == 34408
    assert abs(case.unrolled - 194_000) < 1000
