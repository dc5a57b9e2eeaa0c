"""bench.train_step, in its --quick form, and its check."""

import pytest
from transformers import Qwen3Config

from bench import shapes, step_setup, train_step
from bench.meter import CpuMeter
from bench.running import suite_main
from tests.bench.schema import ONCE, checked_rows
from tests.peak_memory import peak_tensor_bytes


@pytest.fixture
def two_layers(monkeypatch):
    """A model of two layers: no claim needs more."""

    def config(**fields):
        return Qwen3Config(**{**fields, "num_hidden_layers": 2})

    monkeypatch.setattr(step_setup, "Qwen3Config", config)


def test_bench_train_step_quick_has_equal_gradients_and_less_work(
    tmp_path, two_layers, monkeypatch
):
    monkeypatch.setattr(CpuMeter, "peak_bytes", lambda _, call: peak_tensor_bytes(call))
    assert suite_main(train_step.SUITE, [*ONCE, "--json", str(tmp_path / "t.json")]) == 0
    rows = checked_rows(tmp_path / "t.json", train_step.SUITE)
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
    setup = step_setup.PolicyUpdate(group, "small", "cpu")
    setup.run(step_setup.group_passes(setup))
    assert setup.check("ours", None, 0) is None
    last = setup.rollouts[1][-1]
    if wrong == "weight":
        setup.rollouts[1] = [c._replace(weight=c.weight + 1e-3) for c in setup.rollouts[1]]
    if wrong == "order":
        last.path[-3:-1] = last.path[-2], last.path[-3]
    if wrong == "token":
        last.path[-1] += 1
    setup.run(step_setup.group_passes(setup))
    assert "off by" in (setup.check("planted", None, 0) or "")
