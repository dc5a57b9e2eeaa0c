"""bench.model_step on a tiny model: its rows, its check, and its operations."""

import pytest
import torch

from bench import model_step, models, shapes
from bench.model_step import ModelStep
from bench.running import suite_main
from bench.step_setup import group_passes
from bench.suite import Peer
from tests.bench.schema import ONCE, checked_rows
from threadweaver.model import build_tokenizer

CASE = shapes.trajectory(160, 2)


def test_bench_model_step_quick_has_equal_gradients_and_less_work(tmp_path):
    path = tmp_path / "m.json"
    assert suite_main(model_step.SUITE, [*ONCE, "--precision", "fp32", "--json", str(path)]) == 0
    rows = checked_rows(path, model_step.SUITE)
    assert [(row["recompute"], row["peer"]) for row in rows] == [
        (recompute, peer.name) for recompute in ("all", "none") for peer in model_step.SUITE.peers
    ]
    for row in rows:
        assert row["status"] == "ok" and row["model"] == "tiny" and row["dtype"] == "fp32"
        assert row["tokens_per_second"] == pytest.approx(1e3 * row["n"] / row["ms"])
        assert row["tflops"] == pytest.approx(row["flops"] / row["ms"] / 1e9)
        assert row["roofline"] == pytest.approx(row["tflops"])  # of 1 TFLOP/s (conftest)
        ours = row["peer"] == model_step.OURS
        assert row["tokens"] == (row["n"] if ours else row["unrolled"])


@pytest.mark.parametrize("recompute", ["all", "none"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_model_step_check_catches_one_call_less(precision, recompute):
    setup = ModelStep("tiny", CASE, "cpu", precision, recompute)
    setup.run(group_passes(setup))
    assert setup.check("ours", None, 0) is None
    assert all(p.grad is None for p in setup.model.parameters())
    setup.rollouts[0].pop()
    setup.run(group_passes(setup))
    assert "off by" in (setup.check("planted", None, 0) or "")


def test_operations_are_six_a_weight_and_token_and_fourteen_a_pair():
    setup = ModelStep("tiny", CASE, "cpu", "bf16", "none")
    shape, n = models.SHAPES["tiny"], len(CASE.trie)
    layer = 64 * 16 * (4 + 2 + 2) + 4 * 16 * 64 + 3 * 64 * 128 + 2 * 64 + 2 * 16
    weights = 2 * layer + 64 + shape["vocab_size"] * 64  # the output layer's is the embedding
    pairs = int((CASE.trie.positions + 1).sum())
    work = setup.work(model_step.OURS)
    assert work.flops == 6 * weights * n + 2 * 14 * 4 * 16 * pairs
    assert work.dtype == "bfloat16"


@pytest.mark.parametrize(("name", "billions"), [("1.7B", 1.72), ("8B", 8.19)])
def test_large_shapes_have_the_parameters_of_their_names(name, billions):
    model = models.random_model(name, build_tokenizer(), "meta", torch.bfloat16)
    assert all(p.device.type == "meta" for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(billions * 1e9, rel=0.01)
    looked_up = 0 if name == "1.7B" else 151_936 * 4096
    assert models.product_weights(model) == sum(p.numel() for p in model.parameters()) - looked_up


@pytest.mark.parametrize(("memory", "names"), [(24, []), (80, ["1.7B"]), (140, ["1.7B", "8B"])])
def test_models_whose_state_takes_more_than_half_of_the_memory_are_left_out(
    memory, names, monkeypatch
):
    monkeypatch.setattr(model_step, "memory_of", lambda device: memory * 1e9)
    assert model_step._that_fit(torch.device("cuda")) == names


def test_what_does_not_fit_is_skipped_with_the_reason(tmp_path, monkeypatch):
    def prepare(setup):
        def call(i):
            raise torch.OutOfMemoryError("CUDA out of memory")

        return call

    suite = model_step.SUITE
    peers = [Peer("large", prepare, ours=True), suite.peers[0]]
    monkeypatch.setattr(model_step, "SUITE", suite.__class__(**{**vars(suite), "peers": peers}))
    path = tmp_path / "m.json"
    arguments = [*ONCE, "--only", "recompute=none", "--json", str(path)]
    assert suite_main(model_step.SUITE, arguments) == 0
    large, other = checked_rows(path, model_step.SUITE)
    assert large["status"] == "skipped" and "does not fit" in large["reason"]
    assert other["status"] == "ok"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--models", "[9B]"], "no shape '9B'; one of tiny"), (["--tokens", "0"], "--tokens is 0")],
)
def test_what_model_step_cannot_do_is_refused(arguments, message, capsys):
    assert suite_main(model_step.SUITE, arguments) == 2
    assert message in capsys.readouterr().err
