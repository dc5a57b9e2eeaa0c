"""Every example runs, and does what its first line says."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from threadweaver.trajectory import check_format

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def run(*arguments, cwd, path=()):
    """The output of `python ARGUMENTS`, with the folders of `path` on its path."""
    paths = os.pathsep.join(map(str, [*path, ROOT]))
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_attention(tmp_path):
    out = run(EXAMPLES / "attention.py", cwd=tmp_path)
    assert out == "out (6, 4, 64); path 1 is tokens [0, 1, 2, 4, 5] of 6\n"


def test_decode(tmp_path):
    out = run(EXAMPLES / "decode.py", cwd=tmp_path)
    assert out == "out (3, 8, 64); 5 pages read for 9 in tables\n"


def test_engine(tmp_path):
    out = run(EXAMPLES / "engine.py", cwd=tmp_path).splitlines()
    assert len(out) == 4 and all("tokens in" in line for line in out)


def test_own_data(tmp_path):
    run(EXAMPLES / "own_data.py", "--out", tmp_path, "--steps", 2, cwd=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 100 and not any(check_format(row["response"]) for row in rows)
    assert (tmp_path / "run" / "checkpoints" / "step-2" / "model.safetensors").exists()


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder into which examples/own_task is installed."""
    folder = tmp_path_factory.mktemp("own_task")
    source = shutil.copytree(EXAMPLES / "own_task", folder / "source")
    run(
        *("-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"),
        *("--no-build-isolation", "--target", folder / "installed", source),
        cwd=folder,
    )
    return folder / "installed"


def test_the_command_of_the_guide_writes_the_own_task(tmp_path, installed):
    guide = (ROOT / "docs" / "guide.md").read_text()
    (line,) = re.findall(r"^threadweaver tasks write --task letters .*$", guide, re.M)
    assert line in (EXAMPLES / "own_task" / "letters.py").read_text()
    run("-m", *shlex.split(line), cwd=tmp_path, path=[installed])
    folder = tmp_path / "data" / "letters"
    assert [
        len((folder / name).read_text().splitlines())
        for name in ("train.jsonl", "validation.jsonl")
    ] == [1000, 200]


def test_own_task_is_found_by_its_entry_point(tmp_path, installed):
    options = ["--options.length", 10, "--train", 20, "--validation", 5]
    command = ["-m", "threadweaver.tasks", "write", "--task", "letters", "--out", "data"]
    run(*command, *options, cwd=tmp_path, path=[installed])
    rows = [
        json.loads(line)
        for name in ("train", "validation")
        for line in (tmp_path / "data" / f"{name}.jsonl").read_text().splitlines()
    ]
    assert len({row["question"] for row in rows}) == 25
    for row in rows:
        word = row["question"].split()[-1].rstrip("?")
        answer = row["reward_model"]["ground_truth"]
        assert len(word) == 10 and answer == str(word.count("a") + word.count("b"))
        assert row["response"].endswith(f"\\boxed{{{answer}}}")
        assert check_format(row["response"], require_parallel=True) == []
