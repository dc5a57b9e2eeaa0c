"""Self-training on several ranks makes the files that one process makes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from tests.train.conftest import Run
from tests.train.easy_task import write_task
from tests.train.on_ranks import fails_alike, on_ranks
from threadweaver.train.self_train import SelfTraining


@pytest.fixture
def new_run(tmp_path):
    task = str(write_task(tmp_path / "seven.jsonl"))

    def make(name: str) -> Run:
        return Run(
            "self-train",
            tmp_path / name,
            task={"name": task, "problems": 7},
            rollouts={
                "samples": 16,  # one without a control token for each problem
                "chunk": 4,
                "generation": {"max_tokens": 8, "mode": "sequential"},
                "engine": {"kv_gigabytes": 0.01, "max_sequences": 16},
            },
            optimization={"max_steps": 2, "accumulation": 4, "batch_tokens": 512},
        )

    return make


def all_are_right(patch: pytest.MonkeyPatch, dies_at: int | None = None) -> None:
    """Random bytes are no trajectory: here they count as right ones.

    Args:
        dies_at: chunk before which this process is interrupted.
    """
    right = "threadweaver.tasks.data_file.DataFile.submit"
    patch.setattr(right, lambda *_: lambda: True)
    for module in ("evaluate.grade", "train.batches"):
        patch.setattr(f"threadweaver.{module}.violations", lambda *_: [])
    roll_out = SelfTraining._roll_out

    def dying(self, engine, number, *rest):
        if number == dies_at:
            raise KeyboardInterrupt
        return roll_out(self, engine, number, *rest)

    patch.setattr(SelfTraining, "_roll_out", dying)


def in_rank(dies_at: int | None, rank: int) -> None:
    all_are_right(pytest.MonkeyPatch(), dies_at)


def rolled_out(run: Run) -> dict[str, bytes]:
    files = [*(run.folder / "rollouts").iterdir(), run.folder / "kept.jsonl"]
    return {path.name: path.read_bytes() for path in files}


def test_chunks_are_those_of_one_process_also_resumed_on_other_ranks(
    new_run, tmp_path, monkeypatch
):
    all_are_right(monkeypatch)
    alone, ranks = new_run("alone"), new_run("ranks")
    assert alone() == 0
    ended = on_ranks(ranks.arguments(), tmp_path, 4, before=partial(in_rank, 1))
    assert "continue from what was saved with --resume" in ended.one_line(130)
    first = ranks.folder / "rollouts" / "chunk-0.json"
    assert list(first.parent.iterdir()) == [first]
    saved = first.stat().st_mtime_ns
    ended = on_ranks(ranks.arguments("--resume"), tmp_path, 2, before=partial(in_rank, None))
    assert ended.codes == [0, 0] and ended.err == "", ended.err
    assert ended.out.count("Self-training, training problems") == 1
    assert first.stat().st_mtime_ns == saved
    assert rolled_out(ranks) == rolled_out(alone)
    ours, theirs = ranks.summary(), alone.summary()
    assert Path(ours.pop("checkpoint")).is_relative_to(ranks.folder)
    theirs.pop("checkpoint")
    assert ours == theirs


def test_ranks_that_keep_nothing_say_so_once(new_run, tmp_path):
    run = new_run("run")
    run.settings["rollouts"]["generation"] = {"max_tokens": 4}
    line = on_ranks(run.arguments(), tmp_path, 2, before=fails_alike).one_line(2)
    assert line.startswith("error: self-training kept none of 112 rollouts (112 wrong, 0 malformed")
