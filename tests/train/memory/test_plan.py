"""`--plan`: its figures against what processes take, and what it prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from bench.models import SHAPES
from tests.architecture import SMALL
from threadweaver.data import save_rows
from threadweaver.tasks.multiplication import make_rows, split_problems
from threadweaver.train.__main__ import main
from threadweaver.train.config import (
    ComputeConfig,
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimizationConfig,
)
from threadweaver.train.memory.live import LiveBytes
from threadweaver.train.memory.planner import Planner
from threadweaver.train.stages import SFTConfig

ROOT = Path(__file__).parents[3]
TOLERANCE = 0.1
QWEN3_8B = {**SHAPES["8B"], "model_type": "qwen3", "max_position_embeddings": 40960}


def arch(hidden: int, layers: int, **others) -> dict:
    return {
        "model_type": "qwen3",
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 128,
        "head_dim": 64,
        **others,
    }


CASES = {
    "many tokens": ({"arch": arch(256, 4)}, {"batch_tokens": 4096}, {}),
    "recomputed": (
        {"arch": arch(512, 6)},
        {"batch_tokens": 4096},
        {"gradient_checkpointing": True},
    ),
    "large weights": ({"arch": arch(1024, 6)}, {"batch_tokens": 1024}, {}),
    "accumulated": (
        {"arch": arch(512, 6, model_type="llama")},
        {"batch_tokens": 2048, "accumulation": 3},
        {"gradient_checkpointing": 2},
    ),
    "large vocabulary": (
        {"path": "smollm2"},
        {"batch_tokens": 512},
        {"gradient_checkpointing": True},
    ),
    "in passes": (
        {"arch": arch(512, 6)},
        {"batch_tokens": 4096},
        {"pass_tokens": 1024},
    ),
    "adapters": (
        {"arch": arch(1024, 6), "lora": {"rank": 8}},
        {"batch_tokens": 1024},
        {},
    ),
    "two ranks": (
        {"arch": arch(1024, 6)},
        {"batch_tokens": 1024, "accumulation": 2},
        {"ranks": 2},
    ),
    "two ranks, recomputed": (
        {"arch": arch(512, 6)},
        {"batch_tokens": 4096, "accumulation": 4},
        {"ranks": 2, "gradient_checkpointing": True},
    ),
}


@pytest.mark.slow  # and not in every run: what else a machine does moves a resident set
@pytest.mark.parametrize("name", CASES)
def test_the_plan_is_what_a_process_takes(name, tmp_path):
    """Within 10 % of the growth of the resident set. malloc gives freed blocks back: those below 32
    MB it keeps by default, and cannot use for others of another size."""
    problems, _ = split_problems(train=400, validation=1, digits=2, factors=2, seed=0)
    save_rows(list(make_rows(problems, parallel_share=0.5, seed=0)), tmp_path / "data.jsonl")
    model, optimization, compute = CASES[name]
    compute = {"device": "cpu", "precision": "fp32", "threads": 1, **compute}
    optimization = {"max_steps": 2, "learning_rate": 1e-4, **optimization}
    tiny = {"arch": arch(128, 2)}, {**optimization, "batch_tokens": 512}
    ranks = compute.get("ranks", 1)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    files = [tmp_path / f"{run}.yaml" for run in ("tiny", "whole")]
    data = {"train": str(tmp_path / "data.jsonl")}
    for file, (of_run, steps) in zip(files, (tiny, (model, optimization)), strict=True):
        settings = {"run_dir": str(file.with_suffix("")), "data": data, "compute": compute}
        file.write_text(yaml.safe_dump({**settings, "model": of_run, "optimization": steps}))
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "100000", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [
            sys.executable,
            *(launcher if ranks > 1 else []),
            *("-m", "tests.train.memory.measured_peak", *map(str, files)),
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    measured = int(done.stdout.split("grew by ")[1].split()[0])
    lora = LoraConfig(**model["lora"]) if "lora" in model else None
    config = SFTConfig(
        run_dir="unused",
        model=ModelConfig(**{**model, "lora": lora}),
        data=DataConfig(train=data["train"]),
        optimization=OptimizationConfig(**optimization),
        compute=ComputeConfig(**compute),
    )
    planned = Planner(config).plan(config).fullest.total
    assert planned == pytest.approx(measured, rel=TOLERANCE)


def test_live_bytes_counts_each_storage_until_it_is_freed():
    with LiveBytes() as live:
        a = torch.empty(1000)
        b = a[:10]
        assert live.now == 4000
        c = b.double()
        assert live.now == live.peak == 4080
        del a, c
        assert live.now == 4000 and live.peak == 4080
        del b
        assert live.now == 0
        live.reset_peak()
        assert live.peak == 0


@pytest.fixture
def show(tmp_path, capsys):
    """Runs --plan; returns its exit code and what it printed."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**QWEN3_8B, "num_hidden_layers": 2}))

    def run(kind: str, *arguments: str) -> tuple[int, str]:
        fixed = ["--run_dir", str(tmp_path / "run"), "--model.path", str(folder), "--plan"]
        code = main([kind, *fixed, *arguments])
        assert not (tmp_path / "run").exists()
        printed = capsys.readouterr()
        assert not printed.err, printed.err
        return code, printed.out

    return run


def test_a_run_that_does_not_fit_says_with_what_it_would(show):
    on_gpu = ["--data.train", "absent.jsonl", "--optimization.batch_tokens", "4096"]
    on_gpu += ["--compute.device", "cuda", "--compute.device_gb"]
    code, out = show("sft", *on_gpu, "60")
    assert code == 0 and "\nfits: at most" in out
    code, out = show("sft", *on_gpu, "16")
    assert code == 2 and "\ndoes not fit: at most" in out
    options = out.strip().splitlines()[-1].partition(" with: ")[2].split()
    assert options
    code, out = show("sft", *on_gpu, "16", *options)
    assert code == 0 and "\nfits: at most" in out


def test_every_kind_of_run_has_a_plan(show):
    on_gpu = ["--compute.device", "cuda", "--compute.device_gb", "300"]
    few = "--optimization.batch_tokens", "1024"
    for kind, phases in {
        "self-train": ["rollouts", "SFT: update"],
        "rl": ["P-GRPO: rollouts", "P-GRPO: update"],
    }.items():
        code, out = show(kind, *on_gpu, *few)
        assert code == 0
        assert [p for p in phases if f"\n{p}" in f"\n{out}"] == phases
    code, out = show("rl", *on_gpu, *few, "--policy.kl", "0.1", "--report.validate_every", "1")
    assert code == 0 and "reference" in out and "P-GRPO: validation" in out


def test_pages_that_do_not_fit_are_made_fewer(show):
    arguments = ["--compute.device", "cuda", "--compute.device_gb", "60"]
    arguments += ["--optimization.batch_tokens", "1024"]
    code, out = show("rl", *arguments, "--rollouts.engine.kv_gigabytes", "100")
    assert code == 2 and "--rollouts.engine.kv_gigabytes" in out


def test_a_pool_without_a_page_leaves_other_advice(show):
    arguments = ["--compute.device", "cuda", "--compute.device_gb", "6"]
    arguments += ["--optimization.batch_tokens", "1024"]
    code, out = show("rl", *arguments, "--rollouts.engine.kv_gigabytes", "1e-6")
    assert code == 2 and "KV pages" not in out


def test_bad_settings_are_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    fixed = ["sft", "--run_dir", str(tmp_path / "run"), "--data.train", "x.jsonl", "--plan"]
    for arguments, want in (
        (["--model.path", str(tmp_path)], "model.path: "),
        (["--model.arch", "{model_type: qwen3}"], "model.arch: "),
        (["--model.arch", json.dumps(SMALL), "--compute.device_gb", "0"], "compute.device_gb"),
        (["--model.arch", json.dumps(SMALL), "--compute.device", "cuda"], "--compute.device_gb 80"),
        (["--model.arch", json.dumps(SMALL), "--compute.gradient_checkpointing", "9"], "9"),
    ):
        assert main([*fixed, *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and want in error, error
