"""A row that is longer than the model's context: in SFT a demonstration is an error that names file
and line; in P-GRPO, self-training and evaluation a prompt is skipped, with file and line in what
they show. Rotary and learned positions."""

import io
import json
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from tests.cases._runs import ARCH, train
from threadweaver.data import save_rows
from threadweaver.evaluate.__main__ import main as evaluate
from threadweaver.model import build_tokenizer, new_model, save_model

ARCHS = {
    "rotary": {**ARCH, "max_position_embeddings": 128},
    "learned": {
        "model_type": "gpt2",
        "n_embd": 32,
        "n_layer": 1,
        "n_head": 2,
        "n_positions": 128,
        "attn_pdrop": 0.0,
    },
}
SHORT = "<think>\na\n</think>\n\\boxed{7}"
LONG = f"<think>\n{'ab ' * 60}\n</think>\n\\boxed{{7}}"


def fault() -> str | None:
    root = Path(tempfile.mkdtemp())
    responses, prompts = root / "responses.jsonl", root / "prompts.jsonl"
    save_rows([_row("1?\n", SHORT), _row("2?\n", LONG)], responses)
    save_rows([_row("1?\n", SHORT), _row("2" * 128, SHORT)], prompts)
    task = {
        "task.name": prompts,
        "task.options": '{"held_out": 0.0, "whole_numbers": true}',
        "rollouts.engine.kv_gigabytes": 0.01,
        "rollouts.generation.max_tokens": 4,
        "rollouts.samples": 2,
    }
    one_step = {"rollouts.problems": 1, "optimization.steps": 1}
    for name, arch in ARCHS.items():
        base = root / name
        tokenizer = build_tokenizer()
        save_model(new_model(tokenizer, arch), tokenizer, base)
        runs = {
            "sft": lambda options: train("sft", {"data.train": responses, **options}),
            "rl": lambda options: train("rl", {**task, **one_step, **options}),
            "self-train": lambda options: train("self-train", {**task, **options}),
            "eval": lambda options: evaluate(_evaluation(options["model.path"], prompts)),
        }
        for kind, run in runs.items():
            errors, shown = io.StringIO(), io.StringIO()
            with redirect_stderr(errors), redirect_stdout(shown):
                code = run({"run_dir": root / f"{name}-{kind}", "model.path": base})
            line = errors.getvalue()
            if kind == "sft":
                right = code == 2 and f"{responses}:2: " in line and "128" in line
            else:
                want = f"1 of 2 prompts are skipped: {prompts}:2: the prompt has 128 tokens"
                # A model that knows nothing gives self-training nothing to keep.
                right = want in shown.getvalue() and (code == 0 or "kept none of 2" in line)
            if not right or line.count("\n") > 1:
                return f"{kind}, {name} positions: ended with {code}: {line}"
    return None


def _row(question: str, response: str) -> dict:
    return {"question": question, "response": response, "reward_model": {"ground_truth": "7"}}


def _evaluation(model: Path, prompts: Path) -> list[str]:
    options = {
        "model": model,
        "task": prompts,
        "task_options": json.dumps({"held_out": 1.0, "whole_numbers": True}),
        "device": "cpu",
        "precision": "fp32",
        "kv_gigabytes": 0.01,
    }
    return [f"--{name}={value}" for name, value in options.items()]


if __name__ == "__main__":
    sys.exit(fault())
