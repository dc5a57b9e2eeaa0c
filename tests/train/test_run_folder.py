"""The folder of a run belongs to one process, may have any name, and need not have a reader."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from threadweaver.train.__main__ import main
from threadweaver.train.run_dir import relocated, run_root
from threadweaver.train.sft import SFTTrainer

from .test_resume import stop_before


def test_a_run_under_way_is_refused_with_and_without_resume(new_run, monkeypatch, fails):
    run, lines = new_run(), []
    step = SFTTrainer.train_step

    def start_again(self):
        if self.steps_done == 3:
            lines.extend(fails(main(run.arguments(*option)), 2) for option in ([], ["--resume"]))
        return step(self)

    monkeypatch.setattr(SFTTrainer, "train_step", start_again)
    assert run() == 0
    assert len(lines) == 2
    assert all(f"in use by process {os.getpid()} on " in line for line in lines)


def test_a_run_that_could_not_begin_leaves_nothing(new_run, fails):
    run = new_run("a/b/run")
    run.folder.parent.mkdir(parents=True)  # of its settings
    run.settings["run_dir"] = str(run.folder / "c" / "d")
    fails(run("--model.arch.model_type", "nonsense"), 2)
    assert not run.folder.exists()


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(new_run, monkeypatch, fails):
    run = new_run()
    run.folder.write_text("")
    run.settings["run_dir"] = str(run.folder / "below")
    monkeypatch.setattr(SFTTrainer, "load", None)
    line = fails(run(), 2)
    assert str(run.folder / "below") in line and "cannot be written" in line


def test_a_lock_that_is_a_folder_is_named(new_run, fails):
    run = new_run()
    (run.folder / ".lock").mkdir(parents=True)
    assert f"{run.folder / '.lock'} cannot be written" in fails(run(), 2)


def test_paths_with_brackets_and_spaces_are_printed_and_resumed_as_they_are(
    new_run, monkeypatch, capsys
):
    run = new_run("my [red] run")
    step = SFTTrainer.train_step

    def stop_after_third(self):
        if self.steps_done == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(SFTTrainer, "train_step", stop_after_third)
        assert run() == 130
    line = capsys.readouterr().out.splitlines()[-1]
    command = shlex.split(line.partition("continue with: ")[2])
    assert command[:3] == ["python", "-m", "threadweaver.train"]
    assert main(command[3:]) == 0
    shown = capsys.readouterr().out
    assert f"resuming from {run.folder}/checkpoints/step-3" in shown
    assert f"tensorboard --logdir {shlex.quote(str(run.folder))}" in shown
    assert run("--resume") == 0
    assert f"{run.folder}: this run is finished" in capsys.readouterr().out


def test_a_run_whose_output_nobody_reads_any_more_is_saved_and_stops(new_run, monkeypatch, capsys):
    whole, cut = new_run("whole"), new_run("cut")
    assert whole() == 0
    reader, writer = os.pipe()
    with monkeypatch.context() as patch, os.fdopen(writer, "w") as output:
        patch.setattr(sys, "stdout", output)
        os.close(reader)
        assert cut() == 128 + signal.SIGPIPE
    assert capsys.readouterr().err == ""
    assert [m["step"] for m in cut.metrics()] == [1]
    assert (cut.folder / "checkpoints/step-1").is_dir()
    assert cut("--resume") == 0
    assert cut.weights() == whole.weights()


@pytest.mark.parametrize("module", ["add_tags", "evaluate", "generate", "tasks", "train"])
def test_ctrl_c_while_a_command_imports_ends_it_in_one_line(module):
    code = (
        "import sys, runpy\n"
        "class Stop:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'jsonargparse': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Stop())\n"
        "sys.argv[0] = 'x'\n"
        f"runpy.run_module('threadweaver.{module}', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "error: interrupted\n")


def test_a_copied_run_goes_on_in_its_own_folder(new_run, monkeypatch, tmp_path):
    run, copy = new_run(), tmp_path / "copy"
    stop_before(run, monkeypatch, "finish")
    before = sorted(run.folder.rglob("*"))
    shutil.copytree(run.folder, copy)
    assert main(["sft", "--config", str(copy / "config.yaml"), "--resume"]) == 0
    assert sorted(run.folder.rglob("*")) == before
    assert json.loads((copy / "summary.json").read_text())["checkpoint"] == str(
        copy / "checkpoints/step-6"
    )
    assert main(["sft", "--config", str(copy / "config.yaml"), "--resume"]) == 0


def test_a_run_goes_on_from_within_its_folder(new_run, monkeypatch):
    run = new_run()
    run.settings["run_dir"] = run.folder.name
    monkeypatch.chdir(run.folder.parent)
    stop_before(run, monkeypatch, "finish")
    monkeypatch.chdir(run.folder)
    assert main(["sft", "--config", "config.yaml", "--resume"]) == 0
    assert run.summary()["checkpoint"] == str(run.folder / "checkpoints/step-6")


def test_the_whole_run_of_a_stage_is_made_of_folders_of_runs(tmp_path, monkeypatch):
    for folder in ("run", "run/self_train", "run/self_train/sft"):
        (tmp_path / folder).mkdir()
        for name in ("config.yaml", ".lock"):
            (tmp_path / folder / name).write_text("")
    (tmp_path / "config.yaml").write_text("")  # of somebody's settings
    for inside in ("", "run", "run/self_train", "run/self_train/sft"):
        monkeypatch.chdir(tmp_path / inside)
        for folder in ("run", "run/self_train", "run/self_train/sft"):
            path = Path(os.path.relpath(folder, inside))
            assert run_root(path) == run_root(tmp_path / folder) == tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    assert run_root(Path()) == tmp_path
    assert run_root(Path("/")) == Path("/")


def test_paths_outside_a_run_stay_where_they_are(tmp_path, monkeypatch):
    copy = tmp_path / "copies" / "run"
    copy.mkdir(parents=True)
    (copy.parent / "config.yaml").write_text("")  # of somebody's settings
    monkeypatch.chdir(tmp_path)
    for old in (tmp_path / "old", Path("old")):
        assert relocated(str(old / "data.jsonl"), str(old), copy) == str(copy / "data.jsonl")
        outside = str(old.with_name("data.jsonl"))
        assert relocated(outside, str(old), copy) == outside
    # Of a run that was started in its own folder.
    assert relocated(str(tmp_path / "data.jsonl"), ".", copy) == str(tmp_path / "data.jsonl")
