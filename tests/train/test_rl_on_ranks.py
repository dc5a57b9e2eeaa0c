"""P-GRPO on several ranks does what it does in one process."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from tests.train.conftest import ARCH, Run
from tests.train.rl_on_ranks import in_one_process, record, together
from tests.train.test_ranks import LLAMA, weights_of
from threadweaver.model import build_tokenizer, new_model, save_model

OF_RANKS = {"imbalance", "decode_imbalance"}


@pytest.fixture
def new_run(tmp_path):
    def make(name: str, arch: dict = ARCH, **optimization) -> Run:
        return Run(
            "rl",
            tmp_path / name,
            model={"arch": arch},
            rollouts={
                "problems": 5,
                "samples": 4,
                "generation": {"max_tokens": 8},
                "engine": {"kv_gigabytes": 0.01, "max_sequences": 6},
            },
            optimization={
                "steps": 20,
                "batch_tokens": 48,
                "learning_rate": 1e-3,
                **optimization,
            },
            report={"checkpoint_every": 20, "trackers": []},
        )

    return make


def check_alike(ours: Run, theirs: Run) -> None:
    """Checks losses to 1e-5, weights to 1e-4, and all figures."""
    assert len(ours.metrics()) == len(theirs.metrics()) == 20
    for mine, other in zip(ours.metrics(), theirs.metrics(), strict=True):
        assert mine.keys() == other.keys() | OF_RANKS
        assert mine["imbalance"] >= 1 and mine["decode_imbalance"] >= 1
        for name, value in other.items():
            # Advantages of a group add up to 0, so the loss is a small sum of large terms.
            near = {"loss": 1e-7, "mismatch": 1e-6, "max_mismatch": 1e-5}.get(name, 1e-8)
            assert mine[name] == pytest.approx(value, rel=1e-5, abs=near), (mine["step"], name)
    weights = weights_of(theirs)
    for name, value in weights_of(ours).items():
        assert (value - weights[name]).norm() <= 1e-4 * weights[name].norm(), name


@pytest.mark.parametrize(
    ("arch", "count", "updates"),
    [
        pytest.param(ARCH, 2, 1, marks=pytest.mark.slow),
        (ARCH, 4, 2),
        pytest.param(LLAMA, 2, 1, marks=pytest.mark.slow),
        pytest.param(LLAMA, 4, 1, marks=pytest.mark.slow),
    ],
    ids=["qwen3-2", "qwen3-4", "llama-2", "llama-4"],
)
def test_recorded_rollouts_give_the_losses_and_weights_of_one_process(
    new_run, tmp_path, arch, count, updates
):
    alone, ranks = (new_run(name, arch, updates=updates) for name in ("alone", "ranks"))
    if updates > 1:
        tokenizer = build_tokenizer()
        save_model(new_model(tokenizer, arch, seed=0), tokenizer, tmp_path / "model")
        for run in (alone, ranks):
            run.settings["model"] = {"path": str(tmp_path / "model")}
            run.settings["policy"] = {"kl": 0.1, "entropy": 0.01}
    record(alone, tmp_path / "script")
    ended = together(ranks, tmp_path, count, script=tmp_path / "script")
    assert ended.codes == [0] * count, ended.err
    assert ended.err == "" and ended.out.count("P-GRPO, last batch") == 1
    check_alike(ranks, alone)


@pytest.mark.slow
def test_adapters_and_passes_by_subtree_come_out_as_in_one_process(new_run, tmp_path):
    pytest.importorskip("peft")
    alone, ranks = (new_run(name) for name in ("alone", "ranks"))
    tokenizer = build_tokenizer()
    save_model(new_model(tokenizer, ARCH, seed=0), tokenizer, tmp_path / "model")
    for run in (alone, ranks):
        run.settings["model"] = {"path": str(tmp_path / "model"), "lora": {"rank": 4}}
        run.settings["policy"] = {"kl": 0.1, "entropy": 0.01}
        run.settings["compute"]["pass_tokens"] = 20
    record(alone, tmp_path / "script")
    ended = together(ranks, tmp_path, 2, script=tmp_path / "script")
    assert ended.codes == [0, 0], ended.err
    check_alike(ranks, alone)


def test_rollouts_are_the_same_whatever_the_number_of_ranks(new_run, tmp_path):
    seen = []
    for count in (1, 2, 4):
        run = new_run(f"on {count}", steps=3, learning_rate=1e-30)
        dump = tmp_path / f"dump {count}"
        dump.mkdir()
        if count == 1:
            in_one_process(run, dump=dump)
        else:
            ended = together(run, tmp_path, count, dump=dump)
            assert ended.codes == [0] * count, ended.err
        seen.append([of_step(dump, step) for step in range(3)])
    assert seen[0] == seen[1] == seen[2]
    assert all(sorted(responses) == list(range(20)) for responses in seen[0])


def of_step(dump: Path, step: int) -> dict[int, tuple]:
    """What the ranks decoded in a step: each response once, those to a problem on one rank."""
    found: dict[int, tuple] = {}
    for file in dump.glob(f"{step}.*"):
        own = pickle.loads(file.read_bytes())
        assert not own.keys() & found.keys()
        assert all(4 * (n // 4) + i in own for n in own for i in range(4))
        found |= own
    return found
