"""Without the extra `train`: the library's own parts import, and every command names the extra."""

import json
import re
import signal
import subprocess
import sys
import time
import weakref
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from threadweaver.command import TRAIN_MODULES, command, expand_home, fail

COMMANDS = ["add_tags", "eval", "evaluate", "generate", "tasks", "train"]


def run_without(modules: set[str], code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a process in which these modules cannot be imported."""
    block = f"import sys; sys.modules.update(dict.fromkeys({sorted(modules)!r}))\n"
    return subprocess.run(
        [sys.executable, "-c", block + code, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_trajectories_and_the_weaver_need_no_package_of_the_extra():
    code = "import threadweaver.trajectory\nfrom threadweaver.generate import Weaver"
    done = run_without(TRAIN_MODULES, code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("command", "missing", "arguments"),
    [
        *((command, sorted(TRAIN_MODULES), ["--help"]) for command in COMMANDS),
        # A package that is imported only after the arguments have been read.
        ("add_tags", ["transformers"], ["--model", "m", "--out", "no/such/folder"]),
    ],
)
def test_a_command_without_the_extra_names_it_in_one_line(command, missing, arguments):
    code = f"import runpy; runpy.run_module('threadweaver.{command}', run_name='__main__')"
    done = run_without(set(missing), code, *arguments)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and done.stdout == ""
    assert done.stderr.startswith("error: this command needs the package '")
    assert done.stderr.endswith("': pip install 'threadweaver[train]'\n")


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0"), "2.50 G"),
        (None, "400000000000000 bytes"),  # by PyTorch on the CPU
        (MemoryError(), ""),
        (type("ArrayMemoryError", (MemoryError,), {})(), ""),  # as NumPy's
    ],
)
def test_too_little_memory_ends_a_command_in_one_line(error, asked, capsys):
    @command
    def main() -> int:
        if error is not None:
            raise error
        return len(torch.empty(10**14))

    assert main() == 1
    line = capsys.readouterr().err
    assert line.startswith("error: out of memory") and asked in line and "kv_gigabytes" in line
    assert line.count("\n") == 1


def test_too_little_memory_is_said_by_who_knows_what_to_lower(capsys):
    ends = command(throw)
    assert ends(MemoryError("2 KV pages are left: lower max_tokens")) == 1
    assert capsys.readouterr().err == "error: 2 KV pages are left: lower max_tokens\n"
    with pytest.raises(MemoryError) as raised:
        np.empty(10**17)
    assert ends(raised.value) == 1
    assert re.match(
        r"error: out of memory when \S+ \w+ were asked for: lower kv_gigabytes",
        capsys.readouterr().err,
    )


def test_what_others_wrote_in_an_error_gives_a_terminal_no_command(capsys):
    assert fail(ValueError("server: answers \x1b]0;title\x07 \x9b2J\nno"), 2) == 2
    assert capsys.readouterr().err == "error: server: answers ␛]0;title␇ \ufffd2J no\n"


def throw(error: Exception) -> int:
    raise error


def test_an_interrupt_in_a_callback_is_not_lost(capsys):
    @command
    def main() -> int:
        thing = set()
        reference = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGINT))
        del thing
        assert reference() is None
        time.sleep(20)
        return 0

    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_other_errors_of_a_command_are_not_hidden():
    @command
    def main() -> int:
        raise RuntimeError("a fault of ours")

    with pytest.raises(RuntimeError, match="of ours"):
        main()


@pytest.mark.parametrize("arguments", [["sft"], ["sft", "--data.train", "x"]])
def test_required_settings_are_named_without_the_subcommand(arguments, capsys):
    from threadweaver.train.__main__ import main

    assert main(arguments) == 2
    missing = "run_dir" if "x" in arguments else "run_dir, data.train"
    message = f"error: the following arguments are required: {missing}\n"
    assert capsys.readouterr().err == message


def test_a_long_value_is_looked_through_once(capsys):
    from threadweaver.train.__main__ import main

    start = time.process_time()
    assert main(["sft", "--run_dir", "x", "--data.train", "x", "--seed", "x" * 300_000]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: seed: Expected a <class 'int'>") and line.count("\n") == 1
    assert time.process_time() - start < 10  # letter by letter it would be minutes


def test_only_a_path_s_own_tilde_is_the_user_s_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    options = {
        "out": Path("~/runs/x"),
        "model": {"path": "~"},
        "overlap": ["~/a.jsonl", "b~/c.jsonl", "~nobody-has-this-name/d"],
        "prompt": "~/no path",
        "data": None,
        "task": "multiplication",
    }
    expand_home(options, ("out", "model.path", "overlap", "data", "data.train", "task.name", "x.y"))
    assert options == {
        "out": Path("/home/me/runs/x"),
        "model": {"path": "/home/me"},
        "overlap": ["/home/me/a.jsonl", "b~/c.jsonl", "~nobody-has-this-name/d"],
        "prompt": "~/no path",
        "data": None,
        "task": "multiplication",
    }


SFT = ["sft", "--run_dir=~/run", "--model.path=~/absent"]


@pytest.mark.parametrize(
    ("command", "arguments", "said"),
    [
        ("train", [*SFT, "--data.train=~/t.jsonl"], "data.train: HOME/t.jsonl: no such file"),
        ("train", [*SFT, "--data.train=~/rows.jsonl"], "HOME/absent: no model here"),
        ("train", ["rl", *SFT[1:], "--task.name=~/t.jsonl"], "HOME/t.jsonl: no such file"),
        (
            "train",
            [*SFT, "--data.train=~/rows.jsonl", "--report.overlap=[~/t.jsonl]"],
            "report.overlap: HOME/t.jsonl: no such file",
        ),
        (
            "train",
            ["rl", *SFT[1:], "--task.name=aime24", "--task.options={path: ~/t.jsonl}"],
            "HOME/t.jsonl: no such file",
        ),
        ("generate", ["--prompt=1+1", "--model=~/absent"], "HOME/absent: no model here"),
        ("generate", ["--data=~/rows.jsonl", "--model=m", "--out=~/rows.jsonl"], "out: HOME/rows"),
        ("evaluate", ["--model=m", "--n=1", "--task=~/t.jsonl"], "HOME/t.jsonl: no such file"),
        ("evaluate", ["--model=m", "--task=x", "--json=~/rows.jsonl"], "HOME/rows.jsonl: there"),
        (
            "evaluate",
            ["--model=m", "--task=aime24", "--task_options={path: ~/t.jsonl}"],
            "HOME/t.jsonl: no such file",
        ),
        ("annotate", ["--data=~/t.jsonl", "--dry_run"], "HOME/t.jsonl: no such file"),
        ("add_tags", ["--model=m", "--out=~/"], "out: HOME/ is not empty"),
        ("tasks", ["multiplication", "--out=~/rows.jsonl"], "out: HOME/rows.jsonl is a file"),
        ("tasks", ["write", "--task=~/t.jsonl", "--out=~/d"], "HOME/t.jsonl: no such file"),
        ("view", ["run", "~/absent", "--out=~/p.html"], "HOME/absent"),
        ("view", ["trajectory", "~/t.jsonl", "--out=~/p.html"], "HOME/t.jsonl: no such file"),
    ],
)
def test_a_tilde_is_the_user_s_folder_to_every_command(
    command, arguments, said, tmp_path, monkeypatch, capsys
):
    home = tmp_path / "home"
    home.mkdir()
    row = {"question": "1+1=", "response": "2", "answer": "2"}
    (home / "rows.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    package = "add_tags" if command == "add_tags" else f"{command}.__main__"
    assert import_module(f"threadweaver.{package}").main(arguments) == 2
    said = said.replace("HOME/ ", f"{home} ").replace("HOME", str(home))
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
