"""However a rank ends, all of them do, with one line and one exit code."""

import os
import signal
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from tests.train.on_ranks import fails_alike, on_ranks
from threadweaver import rank_errors, ranks
from threadweaver.train import same_on_ranks
from threadweaver.train.config import ConfigError
from threadweaver.train.same_on_ranks import check_data
from threadweaver.train.sft import SFTTrainer


@pytest.fixture
def run(new_run):
    run = new_run()
    run.settings["report"] = {"checkpoint_every": 2, "trackers": []}
    return run


def before_step(step: int, action) -> None:
    """From now on something happens before a step."""
    take = SFTTrainer.train_step

    def train_step(self):
        if self.steps_done + 1 == step:
            action()
        return take(self)

    SFTTrainer.train_step = train_step


def test_what_all_ranks_refuse_is_said_once_without_a_rank(run, tmp_path):
    run.settings["optimization"]["learning_rate"] = -1
    line = on_ranks(run.arguments(), tmp_path, 2, before=fails_alike).one_line(2)
    assert line.startswith("error: optimization.learning_rate is -1")


def test_an_accumulation_that_the_ranks_do_not_divide_is_refused(run, tmp_path):
    run.settings["optimization"]["accumulation"] = 3
    line = on_ranks(run.arguments(), tmp_path, 2, before=fails_alike).one_line(2)
    assert line.startswith("error: optimization.accumulation is 3, and there are 2 ranks")
    assert not run.folder.exists()


def test_a_setting_that_differs_is_named_with_its_rank(run, tmp_path):
    each = [run.arguments(), run.arguments("--optimization.learning_rate", "1e-4")]
    line = on_ranks(each, tmp_path, 2, before=fails_alike).one_line(2)
    assert "optimization.learning_rate is 0.0001 on rank 1 and 0.003 on rank 0" in line
    assert not run.folder.exists()


def test_data_that_differs_is_named_with_its_rank(monkeypatch):
    monkeypatch.setattr(ranks, "gather", lambda value: [value, value, "other"])
    with pytest.raises(ConfigError, match=r"^data\.train: FILE is not the same data on rank 2"):
        check_data("data.train: FILE", "ours")


def elsewhere(rank: int) -> None:
    fails_alike(rank)
    same_on_ranks.SEEN_SECONDS = 0.2
    (folder := Path(f"machine-{rank}")).mkdir()
    os.chdir(folder)


def test_a_run_folder_that_the_ranks_do_not_share_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = run.arguments("--run_dir", "own")
    line = on_ranks(arguments, tmp_path, 2, before=elsewhere).one_line(2)
    assert "run_dir: own is another folder on rank 1 than on rank 0" in line
    assert not list(tmp_path.glob("machine-*/own"))


def test_ranks_that_never_come_are_waited_for_only_so_long(run, tmp_path):
    ended = on_ranks(run.arguments(), tmp_path, 2, size=3, TW_JOIN_SECONDS="2")
    assert "not all 3 ranks came within 2 seconds" in ended.one_line(2)


def out_of_memory(rank: int) -> None:
    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 ...")

    if rank == 1:
        before_step(3, fail)


def unforeseen(rank: int) -> None:
    if rank == 1:
        before_step(3, lambda: [][0])


def test_what_one_rank_meets_with_names_it_and_ends_all(run, tmp_path):
    ended = on_ranks(run.arguments(), tmp_path, 2, before=out_of_memory)
    assert ended.one_line(1).startswith("error: rank 1: out of memory when 20.00 GiB were asked")
    ended = on_ranks(run.arguments("--resume"), tmp_path, 2, before=unforeseen)
    assert ended.codes == [1, 1]
    assert ended.err.count("Traceback") == 1
    assert ended.err.endswith("error: rank 1: IndexError: list index out of range\n")


def seen_late(rank: int) -> None:
    """The rank in whose process the store is fails, and the other is slow to look."""
    rank_errors.LOOK_SECONDS = 5.0
    if rank == 0:
        before_step(3, lambda: [][0])


def test_the_first_rank_stays_until_the_others_have_seen_that_it_failed(run, tmp_path):
    ended = on_ranks(run.arguments(), tmp_path, 2, before=seen_late)
    assert ended.codes == [1, 1] and ended.err.count("error: ") == 1, ended.err
    assert ended.err.endswith("error: rank 0: IndexError: list index out of range\n")


def killed(rank: int) -> None:
    if rank == 1:
        before_step(4, lambda: os.kill(os.getpid(), signal.SIGKILL))


def killed_in(module: str, name: str, rank: int) -> None:
    """Rank 0 is killed when it calls a function of a module."""

    def die(*_, **__) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == 0:
        setattr(import_module(f"threadweaver.train.{module}"), name, die)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("trainer", "save_checkpoint"),
        ("sharded_checkpoint", "save"),
        ("sharded_checkpoint", "load"),
    ],
)
def test_a_rank_that_ends_in_a_checkpoint_is_no_fault_of_the_checkpoint(
    run, tmp_path, module, name
):
    """The other one says that a rank has ended, not that files are to be deleted or room made."""
    resumed, before = name == "load", partial(killed_in, module, name)
    if resumed:
        assert on_ranks(run.arguments(), tmp_path, 2, before=killed).codes[1] == -signal.SIGKILL
    arguments = run.arguments(*(["--resume"] if resumed else []))
    ended = on_ranks(arguments, tmp_path, 2, before=before)
    assert ended.codes == [-signal.SIGKILL, 1], ended.err
    assert ended.err.startswith("error: rank 1: another rank has ended"), ended.err
    assert ended.err.count("\n") == 1, ended.err
    assert on_ranks(run.arguments("--resume"), tmp_path, 2).codes == [0, 0]
    assert run.metrics()[-1]["step"] == 6


def stopped(rank: int) -> None:
    if rank == 1:
        before_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM))


def test_a_rank_that_is_killed_ends_all_and_the_run_goes_on_from_the_checkpoint(run, tmp_path):
    ended = on_ranks(run.arguments(), tmp_path, 2, before=killed)
    assert ended.codes == [1, -signal.SIGKILL], ended.err
    assert ended.err.startswith("error: rank 0: another rank has ended"), ended.err
    assert ended.err.count("\n") == 1, ended.err
    assert [p.name for p in (run.folder / "checkpoints").glob("*")] == ["step-2"]
    assert on_ranks(run.arguments("--resume"), tmp_path, 2).codes == [0, 0]
    assert [m["step"] for m in run.metrics()] == list(range(1, 7))


def test_a_signal_to_one_rank_stops_all_at_the_same_step_saved(run, tmp_path):
    ended = on_ranks(run.arguments(), tmp_path, 2, before=stopped)
    assert ended.codes == [143, 143] and ended.err == "", ended.err
    assert "torchrun --nproc_per_node 2 -m threadweaver.train sft" in ended.out
    assert (run.folder / "checkpoints/step-3").is_dir()


def not_finite(rank: int) -> None:
    fails_alike(rank)
    loss_sum = SFTTrainer._loss_sum

    def spoilt(self, trie):
        factor = torch.nan if rank == 1 and self.steps_done == 1 else 1
        return factor * loss_sum(self, trie)

    SFTTrainer._loss_sum = spoilt


def test_a_loss_that_is_not_finite_on_one_rank_is_kept_with_the_batch_of_all(run, tmp_path):
    line = on_ranks(run.arguments(), tmp_path, 2, before=not_finite).one_line(1)
    assert line.startswith("error: step-2: loss nan")
    folder = run.folder / "nan-step-2"
    assert len(torch.load(folder / "tries.pt")) == 2
    assert (folder / "model/model.safetensors").exists()


def no_room(rank: int) -> None:
    def full(*arguments):
        raise OSError(28, "No space left on device")

    if rank == 1:
        setattr(FileSystemWriter, "write_data", full)  # noqa: B010 (of another signature)


def test_a_rank_that_cannot_write_is_said_once(run, tmp_path):
    line = on_ranks(run.arguments(), tmp_path, 2, before=no_room).one_line(1)
    assert "checkpoints/step-2: cannot be written ([Errno 28] No space left" in line
    assert list((run.folder / "checkpoints").iterdir()) == []
