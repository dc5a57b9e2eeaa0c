"""The environment of a result, and the folder it goes to."""

import subprocess

import pytest
import torch

from bench import environment
from bench.__main__ import main


def test_results_without_a_folder_go_by_device_date_and_commit(tmp_path, monkeypatch):
    env = environment.environment("cpu")
    assert env["threads"] == torch.get_num_threads()
    # Nothing where git does not trust the folder's owner.
    said = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=environment.REPOSITORY, capture_output=True, text=True
    )
    assert (env["commit"] or "") == (said.stdout.strip() if said.returncode == 0 else "")
    fixed = {
        "device": "AMD EPYC 9B14 96-Core Processor",
        "device_type": "cpu",
        "cpu_count": 2,
        "date": "2026-11-25T18:00:00+00:00",
        "commit": "0123456789abcdef",
        "dirty": False,
        "threads": 1,
    }
    monkeypatch.setattr(environment, "REPOSITORY", tmp_path)
    monkeypatch.setattr("bench.running.environment", lambda device: fixed)
    assert main(["run", "layout", "--quick", "--only", "case=pack*", "--json"]) == 0
    folder = tmp_path / "bench" / "results" / "epyc-2-cores" / "2026-11-25-012345678"
    assert [path.name for path in folder.iterdir()] == ["layout.json"]
    assert environment.results_folder({**fixed, "dirty": True}).name == "2026-11-25-012345678-dirty"


def test_the_commit_of_a_tree_without_its_history_is_named(tmp_path, monkeypatch):
    known = environment.environment("cpu")["commit"]
    monkeypatch.setenv("TW_COMMIT", "0123456789abcdef")
    assert environment.environment("cpu")["commit"] == (known or "0123456789abcdef")
    monkeypatch.setattr(environment, "REPOSITORY", tmp_path)
    env = environment.environment("cpu")
    assert env["commit"] == "0123456789abcdef" and not env["dirty"]


@pytest.mark.parametrize(
    ("device", "type_", "slug"),
    [
        ("NVIDIA H100 80GB HBM3", "cuda", "nvidia-h100"),
        ("NVIDIA A100-SXM4-80GB", "cuda", "nvidia-a100-sxm4"),
        ("NVIDIA GeForce RTX 4090", "cuda", "nvidia-geforce-rtx-4090"),
        ("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "cpu", "xeon-2-cores"),
        ("Apple M3", "cpu", "apple-m3-2-cores"),
    ],
)
def test_a_device_is_known_by_its_name_without_its_memory(device, type_, slug):
    env = {"device": device, "device_type": type_, "cpu_count": 2}
    assert environment.device_slug(env) == slug


def test_a_tree_is_dirty_where_the_sources_differ_from_the_commit(tmp_path, monkeypatch):
    def git(*arguments):
        name = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
        subprocess.run(["git", *name, *arguments], cwd=tmp_path, check=True, capture_output=True)

    files = ("kernel.py", "docs/benchmarks.md", "bench/frame.py", "bench/results/a/b.json")
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("one\n")
    git("init")
    git("add", ".")
    git("commit", "-m", "one")
    monkeypatch.setattr(environment, "REPOSITORY", tmp_path)
    for file, dirty in zip((*files, "new.py"), (True, False, True, False, False), strict=True):
        (tmp_path / file).write_text("two\n")
        assert environment.environment("cpu")["dirty"] is dirty, file
        git("reset", "--hard")
