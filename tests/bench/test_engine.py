"""bench.engine on a tiny model: its rows, and its check of capped peers."""

import pytest

from bench import engine, rollout_cases
from bench.engine import EngineSetup, RandomLanguage
from bench.rollout import PARALLEL, SEQUENTIAL
from bench.rollout_peers import GENERATE, generate
from bench.rollout_setup import Generated
from bench.running import suite_main
from tests.bench.schema import ONCE, checked_rows


def small(seconds=60.0):
    case = rollout_cases.fork_join(2, threads=2, length=6)
    return EngineSetup(case, RandomLanguage("tiny", "fp32", "cpu"), seconds)


def tokens(setup):
    """That a call computes: those of the prompts, and one a response."""
    return sum(len(t.prompt) + 1 for t in setup.trajectories)


def test_bench_engine_quick_has_the_rate_of_tokens_and_the_floor_of_the_weights(tmp_path):
    path = tmp_path / "e.json"
    assert suite_main(engine.SUITE, [*ONCE, "--dtype", "fp32", "--json", str(path)]) == 0
    rows = {row["peer"]: row for row in checked_rows(path, engine.SUITE)}
    assert list(rows) == [PARALLEL, SEQUENTIAL, GENERATE]
    weights = 2048 * 64 + 2 * (64 * 16 * 8 + 4 * 16 * 64 + 3 * 64 * 128 + 2 * 64 + 2 * 16) + 64
    for row in rows.values():
        assert row["status"] == "ok" and row["tokens"] > 0
        assert row["tokens_per_second"] == pytest.approx(1e3 * row["tokens"] / row["ms"])
        assert row["bytes"] == row["steps"] * weights * 4
        assert row["of_floor"] == pytest.approx(row["ms"] / row["floor_ms"])
    for name, other in ((SEQUENTIAL, rows[SEQUENTIAL]), (GENERATE, rows[GENERATE])):
        assert rows[PARALLEL]["ratios"][name] == pytest.approx(
            rows[PARALLEL]["tokens_per_second"] / other["tokens_per_second"]
        )
    assert rows[PARALLEL]["steps"] < rows[SEQUENTIAL]["steps"] == rows[GENERATE]["steps"]
    assert rows[PARALLEL]["max_mismatch"] <= 1e-4


def test_transformers_makes_only_the_first_tokens_that_fit_in_its_time(monkeypatch):
    setup = small(seconds=1e-9)
    result = generate(setup, setup.generate_seconds)(0)
    assert result.steps == 1 and [len(r) for r in result.responses] == [1, 1]
    assert setup.check(GENERATE, result, 0) is None
    assert setup.measured[GENERATE] == {"steps": 1, "tokens": 2}
    row = setup.figures(GENERATE, 0.5)
    assert row["tokens"] == 2 and row["tokens_per_second"] == 4 and row["ms_per_step"] == 500
    flops, read, _ = setup.work(GENERATE)
    assert flops and flops // (2 * tokens(setup)) * 4 == read  # one step
    whole = generate(setup)(0)
    assert whole.responses == [t.response for t in setup.trajectories]


def test_the_engine_check_catches_a_wrong_or_missing_first_token():
    setup = small()
    right = [t.response[:5] for t in setup.trajectories]
    assert setup.check(GENERATE, Generated(right, 5, []), 0) is None
    for wrong in ([right[0], []], [right[0], [right[1][0] + 1, *right[1][1:]]]):
        assert "request 1" in (setup.check(GENERATE, Generated(wrong, 5, []), 0) or "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "[9B]"], "no shape '9B'; one of tiny, 0.6B, 1.7B, 4B, 8B, 14B, 32B"),
        (["--requests", "0"], "--requests is 0"),
        (["--generate_seconds", "0"], "--generate_seconds is 0"),
    ],
)
def test_what_the_engine_suite_cannot_do_is_refused(arguments, message, capsys):
    assert suite_main(engine.SUITE, arguments) == 2
    assert message in capsys.readouterr().err


def test_naming_the_setups_on_a_gpu_makes_no_model(monkeypatch):
    monkeypatch.setattr(engine, "random_model", None)
    monkeypatch.setattr(engine, "resolve", lambda precision, device: "bf16")
    keys = [setup.key for setup in engine.setups(engine.EngineOptions(device="cuda"))]
    assert [(k["model"], k["case"], k["slots"]) for k in keys] == [
        (model, f"fork-join-{n}", 4 * n) for model in ("1.7B", "8B") for n in (1, 64)
    ]
