"""compute.precision auto is settled once a run, said once, and kept wherever the run goes on."""

from __future__ import annotations

import pytest
import torch
import yaml

from threadweaver import device
from threadweaver.generate.runner import Runner


@pytest.fixture
def instructions(monkeypatch):
    """Makes this processor one that has them, or none."""

    def set_to(*found: str) -> None:
        monkeypatch.setattr(device, "bfloat16_instructions", lambda: found)

    return set_to


@pytest.fixture
def run(new_run):
    run = new_run("run")
    run.settings["compute"] = {"device": "cpu", "threads": 1}
    return run


@pytest.mark.parametrize(
    ("found", "precision", "reason"),
    [((), "fp32", "would have to emulate"), (("AMX",), "bf16", "multiplies bfloat16 by AMX")],
)
def test_auto_is_said_once_and_kept_with_its_reason(
    run, instructions, capsys, found, precision, reason
):
    instructions(*found)
    assert run() == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "compute.precision" in line]
    assert len(said) == 1 and said[0].startswith(f"compute.precision: {precision}, since ")
    assert reason in said[0]
    config = (run.folder / "config.yaml").read_text()
    assert config.startswith(f"# {said[0]}\n")
    assert yaml.safe_load(config)["compute"]["precision"] == precision


def test_a_run_goes_on_in_the_precision_it_started_with(run, instructions, capsys):
    instructions()
    assert run("--optimization.max_steps", "2") == 0
    (run.folder / "summary.json").unlink()
    before = (run.folder / "config.yaml").read_text()
    instructions("AVX512_BF16")  # it goes on on another machine
    capsys.readouterr()
    assert run("--optimization.max_steps", "2", "--resume") == 0
    assert "compute.precision" not in capsys.readouterr().out
    assert (run.folder / "config.yaml").read_text() == before
    (run.folder / "summary.json").unlink()
    assert run("--optimization.max_steps", "2", "--resume", "--compute.precision", "bf16") == 2
    assert "compute.precision is bf16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "no compute.precision"),
        ("[1, 2]", "no compute.precision"),
        ("run_dir: [", "expected"),
        ("compute: {precision: auto}", "neither bf16 nor fp32"),
    ],
)
def test_a_damaged_config_of_the_run_is_named(run, capsys, text, part):
    run.folder.mkdir()
    (run.folder / "config.yaml").write_text(text)
    assert run("--resume") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert str(run.folder / "config.yaml") in line and part in line and "delete it" in line


@pytest.mark.parametrize("found", [(), ("AMX",)])
def test_auto_trains_as_the_precision_that_it_names(run, new_run, instructions, found):
    instructions(*found)
    assert run() == 0
    named = new_run("named")
    named.settings["compute"]["precision"] = "bf16" if found else "fp32"
    assert named() == 0
    assert run.metrics() == named.metrics()


def test_emulated_bf16_is_allowed_and_warned_of_once(run, instructions, monkeypatch, capsys):
    instructions()
    monkeypatch.setattr(device, "emulation_ratio", lambda device: 9.0)
    device._warn.cache_clear()
    assert run("--compute.precision", "bf16") == 0
    assert capsys.readouterr().err.count("warning: precision bf16") == 1


@pytest.mark.parametrize(
    ("tokens", "weights", "threads"),
    [(1, 98_000, 1), (16, 98_000, 1), (256, 98_000, 4), (1, 885_000, 3), (1, 50_000_000, 4)],
)
def test_a_step_takes_as_many_threads_as_its_work_fills(monkeypatch, tokens, weights, threads):
    runner = Runner.__new__(Runner)
    runner._device, runner._largest_matrix = torch.device("cpu"), weights
    counts = [4]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    with runner._threads(tokens):
        assert counts[-1] == threads
    assert counts[-1] == 4
