"""bench.rollout, in its --quick form, its check, and what it refuses."""

import json

import pytest

from bench import rollout, rollout_cases, rollout_peers
from bench.rollout_setup import CONTINUOUS, Generated, RolloutSetup
from bench.running import suite_main
from tests.bench.schema import ONCE, checked_rows
from threadweaver import model


@pytest.fixture
def two_layers(monkeypatch):
    """The untrained model with two layers: no claim needs more."""

    def new_model(tokenizer, arch):
        return model.new_model(tokenizer, {**arch, "num_hidden_layers": 2})

    monkeypatch.setattr(rollout_cases, "new_model", new_model)


def test_bench_rollout_quick_generates_the_recorded_tokens_in_fewer_steps(tmp_path, two_layers):
    path = tmp_path / "r.json"
    assert suite_main(rollout.SUITE, [*ONCE, "--dtype", "fp32", "--json", str(path)]) == 0
    rows = {(row["case"], row["peer"]): row for row in checked_rows(path, rollout.SUITE)}
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
    language = rollout_cases.Language("tiny", "fp32", "cpu")
    setup = RolloutSetup(rollout_cases.mixed(2, 2, 16), language)
    responses = [list(t.response) for t in setup.trajectories]
    assert setup.check("planted", Generated(responses, 1, []), 0) is None
    responses[1][3] += 1
    wrong = setup.check("planted", Generated(responses, 1, []), 0)
    assert wrong == "request 1 did not get its recorded response"


def test_continuous_batching_is_checked_by_its_models_own_choice():
    language = rollout_cases.Language("tiny", "fp32", "cpu")
    setup = RolloutSetup(rollout_cases.mixed(2, 2, 16), language)
    try:
        generated = rollout_peers._continuous(setup)(0)
    finally:
        setup.close()
    assert setup.check(CONTINUOUS, generated, 0) is None
    generated.responses[1][3] = (generated.responses[1][3] + 1) % 256
    assert "below the best" in (setup.check(CONTINUOUS, generated, 0) or "")
    generated.responses[1].pop()
    assert "request 1" in (setup.check(CONTINUOUS, generated, 0) or "")


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
    assert suite_main(rollout.SUITE, ["--quick", option, value]) == 2
    error = capsys.readouterr().err
    assert option in error and message in error and error.count("\n") == 1


def test_naming_the_setups_of_rollout_loads_no_model(monkeypatch):
    monkeypatch.setattr(rollout_cases, "load_model", None)
    keys = [setup.key for setup in rollout.setups(rollout.RolloutOptions())]
    assert {key["model"] for key in keys} == {"smollm2", "tiny"}
