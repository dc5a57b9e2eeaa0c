"""What good inputs are made of: a tiny model, a data file, run folders and results of benchmarks,
each made once."""

from __future__ import annotations

import copy
import json
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from tests.products import ARCH, TOKENIZER
from threadweaver.model import build_tokenizer, new_model, save_model
from threadweaver.tasks.multiplication import make_rows, split_problems
from threadweaver.train.__main__ import main as train

TINY = {
    **ARCH,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "max_position_embeddings": 512,
}
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
GENERATION = {"max_tokens": 4}
ENGINE = {"kv_gigabytes": 0.001, "max_sequences": 4}
ROLLOUTS = {"generation": GENERATION, "engine": ENGINE}
SAMPLED = ["--kv_gigabytes=0.001", "--max_tokens=4", "--device=cpu", "--precision=fp32"]


class Place:
    """A folder for all that inputs are made of."""

    def __init__(self, root: Path):
        self.root = root
        halves = split_problems(train=8, validation=1, digits=1, factors=2, seed=0)
        self.rows: list[dict[str, Any]] = [*make_rows(halves[0], parallel_share=0.5, seed=0)]
        self.data = root / "good.jsonl"
        self.data.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    @cached_property
    def model(self) -> Path:
        save_model(new_model(TOKENIZER, TINY), TOKENIZER, self.root / "model")
        return self.root / "model"

    @cached_property
    def chat_model(self) -> Path:
        """The same with a chat template."""
        tokenizer = build_tokenizer()
        tokenizer.chat_template = TEMPLATE
        save_model(new_model(tokenizer, TINY), tokenizer, self.root / "chat-model")
        return self.root / "chat-model"

    def settings(self, kind: str, run_dir: Path) -> dict[str, Any]:
        """Of a run of one step; to be changed at will."""
        return copy.deepcopy(self._settings(kind, run_dir))

    def _settings(self, kind: str, run_dir: Path) -> dict[str, Any]:
        shared = {
            "run_dir": str(run_dir),
            "model": {"path": str(self.model)},
            "compute": {"device": "cpu", "precision": "fp32", "threads": 1},
            "report": {"trackers": []},
        }
        task = {"name": str(self.data), "options": {"held_out": 0.3, "whole_numbers": True}}
        steps = {"max_steps": 1, "batch_tokens": 512}
        rl = {
            "rollouts": {"problems": 1, "samples": 2, **ROLLOUTS},
            "optimization": {"steps": 1, "batch_tokens": 512},
        }
        evaluate = {"problems": 1, **ROLLOUTS}
        if kind == "sft":
            return {**shared, "data": {"train": str(self.data)}, "optimization": steps}
        if kind == "rl":
            return {**shared, "task": task, **rl}
        self_train = {"rollouts": dict(ROLLOUTS), "optimization": steps}
        if kind == "self-train":
            return {**shared, "task": task, **self_train}
        sft = {"data": str(self.data), "optimization": steps}
        return {
            **shared,
            "task": task,
            "sft": sft,
            "self_train": {"skip": True, **self_train},
            "rl": rl,
            "evaluate": evaluate,
        }

    def run_to_resume(self, kind: str, to: Path) -> tuple[list[str], bytes]:
        """A copy of a run that was stopped after the first of two steps; how to resume it, and the
        weights that it must then come to."""
        settings = self.root / f"{kind}.yaml"
        base = self.root / f"run-{kind}"
        weights = base.with_suffix(".safetensors")
        if not weights.exists():
            wanted = self.settings(kind, to)
            wanted["optimization"]["max_steps" if kind == "sft" else "steps"] = 2
            wanted["report"] = {"checkpoint_every": 1, "trackers": []}
            settings.write_text(yaml.safe_dump({n: v for n, v in wanted.items() if n != "run_dir"}))
            assert train([kind, f"--config={settings}", f"--run_dir={base}"]) == 0
            last = base / "checkpoints" / "step-2"
            (last / "model.safetensors").rename(weights)
            shutil.rmtree(last)
            (base / "summary.json").unlink()
        shutil.copytree(base, to)
        return [kind, f"--config={settings}", f"--run_dir={to}", "--resume"], weights.read_bytes()

    def results(self, to: Path) -> Path:
        """A folder with one result file of a benchmark."""
        to.mkdir()
        env = {"benchmark": "layout", "device": "a CPU", "device_type": "cpu", "threads": 1}
        env |= {"key": ["case"], "date": "2026-01-01T00:00:00", "commit": "0" * 40, "dirty": False}
        env |= {"versions": {"torch": "2"}, "python": "3.11", "absent": {"peer": "not here"}}
        row = {"ours": True, "status": "ok", "ms": 1.0, "iqr_ms": 0.1, "repeats": 3}
        rows = [
            {"case": case, "peer": peer, **row, "ours": peer == "ours"}
            for case in ("a", "b")
            for peer in ("ours", "other")
        ]
        (to / "layout.json").write_text(json.dumps({"env": env, "rows": rows}))
        return to
