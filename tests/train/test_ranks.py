"""SFT on several ranks does what it does in one process."""

import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.train.conftest import ARCH
from tests.train.on_ranks import Ranks, on_ranks
from threadweaver.train.checkpoint import all_checkpoints, load_state
from threadweaver.train.sft import SFTTrainer

LLAMA = {**ARCH, "model_type": "llama", "tie_word_embeddings": False}


@pytest.fixture
def run_of_20(new_run):
    """Makes a run of 20 steps of 4 micro-batches, the last of each epoch shorter."""

    def make(name: str, arch: dict = ARCH):
        run = new_run(name)
        run.settings["model"] = {"arch": arch}
        run.settings["optimization"] |= {"max_steps": 20, "batch_tokens": 128, "accumulation": 4}
        run.settings["report"] = {
            "validate_every": 10,
            "checkpoint_every": 7,
            "trackers": [],
        }
        return run

    return make


def weights_of(run) -> dict[str, torch.Tensor]:
    return load_file(Path(run.summary()["checkpoint"]) / "model.safetensors")


def check_alike(ours, theirs) -> None:
    """Checks losses to 1e-5, weights to 1e-4, and all counts."""
    assert len(ours.metrics()) == len(theirs.metrics()) == 20
    for mine, other in zip(ours.metrics(), theirs.metrics(), strict=True):
        assert mine.pop("imbalance", 1) >= 1
        assert mine.keys() - {"imbalance"} == other.keys() - {"imbalance"}
        for name, value in other.items():
            if name != "imbalance":
                assert mine[name] == pytest.approx(value, rel=1e-5), (mine["step"], name)
    weights = weights_of(theirs)
    assert weights_of(ours).keys() == weights.keys()
    for name, value in weights_of(ours).items():
        assert (value - weights[name]).norm() <= 1e-4 * weights[name].norm(), name


@pytest.mark.parametrize(
    ("arch", "count"),
    [
        pytest.param(ARCH, 2, id="qwen3-2"),
        pytest.param(ARCH, 4, id="qwen3-4", marks=pytest.mark.slow),
        pytest.param(LLAMA, 2, id="llama-2", marks=pytest.mark.slow),
        pytest.param(LLAMA, 4, id="llama-4", marks=pytest.mark.slow),
    ],
)
def test_losses_and_weights_are_those_of_one_process(run_of_20, tmp_path, arch, count):
    alone, together = run_of_20("alone", arch), run_of_20("together", arch)
    assert alone() == 0
    ended = on_ranks(together.arguments(), tmp_path, count)
    assert ended.codes == [0] * count, ended.err
    assert ended.err == "" and ended.out.count("Supervised fine-tuning") == 1
    assert f"torchrun --nproc_per_node {count} -m threadweaver.train sft --model.path" in ended.out
    check_alike(together, alone)


def test_adapters_are_those_of_one_process(run_of_20, tmp_path):
    alone, together = run_of_20("alone"), run_of_20("together")
    for run in (alone, together):
        run.settings["model"]["lora"] = {"rank": 4, "alpha": 8}
    assert alone() == 0
    started = on_ranks(together.arguments(), tmp_path, 2, before=partial(stop_in_step, 9))
    assert started.codes == [130, 130], started.err
    last = together.folder / "checkpoints/step-9"
    assert (last / "adapter_model.safetensors").exists() and not (last / "state").exists()
    resumed = on_ranks(together.arguments("--resume"), tmp_path, 2)
    assert resumed.codes == [0, 0], resumed.err
    check_alike(together, alone)
    for name in ("base/model", "checkpoints/step-20/adapter_model"):
        ours, theirs = (load_file(r.folder / f"{name}.safetensors") for r in (together, alone))
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert (ours[key] - value).norm() <= 1e-4 * value.norm(), key


def stop_in_step(step: int, rank: int = 0) -> None:
    """Stops the run when this step is done, as by Ctrl-C."""
    take = SFTTrainer.train_step

    def train_step(self):
        if self.steps_done + 1 == step:
            os.kill(os.getpid(), signal.SIGINT)
        return take(self)

    SFTTrainer.train_step = train_step


def test_a_run_goes_on_with_any_number_of_ranks(run_of_20, tmp_path, monkeypatch):
    alone, moved = run_of_20("alone"), run_of_20("moved")
    assert alone() == 0
    first = on_ranks(moved.arguments(), tmp_path, 2, before=partial(stop_in_step, 4))
    assert first.codes == [130, 130], first.err
    resumed = moved.arguments("--resume")
    second = on_ranks(resumed, tmp_path, 4, before=partial(stop_in_step, 9))
    assert second.codes == [130] * 4, second.err
    with monkeypatch.context() as patch:
        patch.setattr(SFTTrainer, "train_step", SFTTrainer.train_step)  # set back at the end
        stop_in_step(15)
        assert moved("--resume") == 130
    assert (moved.folder / "checkpoints/step-15/model.safetensors").exists()
    assert on_ranks(resumed, tmp_path, 2).codes == [0, 0]
    check_alike(moved, alone)


@pytest.mark.slow
def test_ten_kills_at_random_moments_lose_only_the_steps_since_the_last_checkpoint(
    run_of_20, tmp_path
):
    alone, killed = run_of_20("alone"), run_of_20("killed")
    killed.settings["report"]["checkpoint_every"] = 2
    assert alone() == 0
    seed = random.randrange(1000)
    print("seed", seed)
    rng = random.Random(seed)
    metrics, checkpoints = killed.folder / "metrics.jsonl", killed.folder / "checkpoints"
    for number in range(10):
        before = all_checkpoints(checkpoints)
        arguments = killed.arguments(*(["--resume"] if number else []))
        ranks = Ranks(arguments, tmp_path, 2)
        started = time.time()
        while ranks.are_running() and not (metrics.exists() and metrics.stat().st_mtime > started):
            time.sleep(0.01)
        time.sleep(rng.random() * 0.5)  # in the midst of a step or of a checkpoint
        if not ranks.are_running():
            break  # it was faster
        victim = rng.randrange(2)
        ranks.processes[victim].kill()
        ended = ranks.wait()
        assert ended.codes[victim] == -signal.SIGKILL
        assert ended.codes[1 - victim] == 1, ended.err
        assert ended.err.startswith(f"error: rank {1 - victim}: another rank has ended"), ended.err
        assert ended.err.count("\n") == 1, ended.err
        after = all_checkpoints(checkpoints)
        assert not before or after  # the newest of before is there, or one after it
        for path in after:
            load_state(path, "step")
    if not (killed.folder / "summary.json").exists():
        assert on_ranks(killed.arguments("--resume"), tmp_path, 2).codes == [0, 0]
    check_alike(killed, alone)
    assert [m["step"] for m in killed.metrics()] == list(range(1, 21))
