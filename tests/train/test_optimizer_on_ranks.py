"""Training with moments of 8 bits on several ranks."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.train.conftest import ARCH
from tests.train.on_ranks import on_ranks
from tests.train.test_ranks import stop_in_step
from threadweaver.train.sft import SFTTrainer

pytest.importorskip("torchao")
# Of whose matrices some have moments of 8 bits on four ranks too.
WIDE = {**ARCH, "hidden_size": 64, "intermediate_size": 256}
PARAMETERS = {
    "fp32": {"device": "cpu", "precision": "fp32", "threads": 1},
    "bf16": {"device": "cpu", "parameters": "bf16", "threads": 1},
}


@pytest.fixture
def run_of(new_run):
    """Makes a run of 4 steps."""

    def make(name: str, parameters: str = "fp32", **model):
        run = new_run(name)
        run.settings["model"] = {"arch": WIDE, **model}
        run.settings["compute"] = PARAMETERS[parameters]
        run.settings["optimization"] |= {
            "optimizer": "adamw-8bit",
            "max_steps": 4,
            "batch_tokens": 128,
            "accumulation": 4,
        }
        run.settings["report"] = {"validate_every": 4, "checkpoint_every": 2, "trackers": []}
        return run

    return make


def eagerly(rank: int, stop: int | None = None, folder: Path | None = None) -> None:
    """Prepares a rank.

    Args:
        stop: the step after which it stops.
        folder: gets what the rank has of the adapters when it ends.
    """
    torch.compiler.set_stance("force_eager")
    if stop is not None:
        stop_in_step(stop, rank)
    if folder is not None:
        finish = SFTTrainer.finish

        def save(self):
            trained = {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}
            save_file(trained, folder / f"adapters-{rank}")
            finish(self)

        SFTTrainer.finish = save


def check_alike(ours, theirs, file: str) -> None:
    """Checks losses to 1e-5 and weights, which part where a moment that lies between two codes is
    rounded to the other: by less than 1e-3, and in one of a hundred at most by more than 1e-6."""
    losses = [[record["loss"] for record in run.metrics()] for run in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    mine, others = (load_file(r.folder / f"checkpoints/step-4/{file}") for r in (ours, theirs))
    assert mine.keys() == others.keys()
    for name, value in others.items():
        error = mine[name] - value
        assert error.norm() <= 1e-3 * value.norm(), name
        assert (error.abs() > 1e-6).sum() <= 0.01 * value.numel(), name


@pytest.mark.parametrize(
    ("parameters", "count"),
    [
        ("fp32", 2),
        pytest.param("fp32", 4, marks=pytest.mark.slow),
        pytest.param("bf16", 2, marks=pytest.mark.slow),
    ],
)
def test_it_trains_as_one_process_and_resumes_bit_for_bit(
    run_of, tmp_path, eager, parameters, count
):
    alone, whole, stopped = (run_of(name, parameters) for name in ("alone", "whole", "stopped"))
    ended = on_ranks(whole.arguments(), tmp_path, count, before=eagerly)
    assert ended.codes == [0] * count, ended.err
    shutil.copytree(whole.folder, stopped.folder)
    # As if it had been killed after its first checkpoint.
    (stopped.folder / "summary.json").unlink()
    shutil.rmtree(stopped.folder / "checkpoints/step-4")
    ended = on_ranks(stopped.arguments("--resume"), tmp_path, count, before=eagerly)
    assert ended.codes == [0] * count, ended.err
    assert stopped.weights() == whole.weights()
    if parameters == "bf16":  # which each rank rounds at random for itself
        losses = [record["loss"] for record in whole.metrics()]
        assert losses[-1] < 0.9 * losses[0]
        return
    assert alone() == 0
    check_alike(whole, alone, "model.safetensors")


@pytest.mark.parametrize("parameters", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_adapters_are_equal_on_all_ranks_bit_for_bit(run_of, tmp_path, eager, parameters):
    """Each rank takes the step of all of them: nothing in it is rounded at random."""
    lora = {"rank": 64, "alpha": 64}
    alone, together = (run_of(name, parameters, lora=lora) for name in ("alone", "together"))
    ended = on_ranks(together.arguments(), tmp_path, 2, before=partial(eagerly, stop=2))
    assert ended.codes == [130, 130], ended.err
    saving = partial(eagerly, folder=tmp_path)
    ended = on_ranks(together.arguments("--resume"), tmp_path, 2, before=saving)
    assert ended.codes == [0, 0], ended.err
    first, second = (load_file(tmp_path / f"adapters-{rank}") for rank in range(2))
    assert first.keys() == second.keys() and len(first) > 2 * 14
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    if parameters == "bf16":  # hidden states, too, are in bfloat16 on ranks alone
        return
    assert alone() == 0
    check_alike(together, alone, "adapter_model.safetensors")
