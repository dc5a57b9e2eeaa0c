"""A data file so easy that a tiny model has it in a hundred steps: the answer is always 7."""

from __future__ import annotations

from pathlib import Path

from threadweaver.data import save_rows, trajectory_row

from .conftest import ARCH

SEQUENTIAL = "<think>\na\n</think>\n\\boxed{7}"
PARALLEL = (
    "<think>\n<Parallel>\n<Outlines>\n<Outline>1: a</Outline>\n<Outline>2: b</Outline>\n"
    "</Outlines>\n<Thread>\n1: aaa</Thread><Thread>\n2: bbb</Thread>\n</Parallel>\n</think>\n"
    "\\boxed{7}"
)


def write_task(path: Path, count: int = 40) -> Path:
    """Every other row in parallel."""
    responses = (SEQUENTIAL, PARALLEL)
    save_rows([trajectory_row(f"{i}?\n", responses[i % 2], "7") for i in range(count)], path)
    return path


def pipeline_settings(run_dir: Path, task_file: Path) -> dict:
    """Settings of a pipeline that runs in seconds; every stage has something to do."""
    generation = {"max_tokens": 80}
    engine = {"kv_gigabytes": 0.01, "max_sequences": 32}
    optimization = {"batch_tokens": 512, "learning_rate": 1e-2, "weight_decay": 0.0}
    return {
        "run_dir": str(run_dir),
        "model": {"arch": {**ARCH, "max_position_embeddings": 512}},
        "task": {"name": str(task_file), "options": {"held_out": 0.3}},
        "sft": {"data": str(task_file), "optimization": {**optimization, "max_steps": 60}},
        "self_train": {
            "problems": 12,
            "rollouts": {
                "samples": 2,
                "keep_per_problem": 2,
                "chunk": 5,
                "generation": generation,
                "engine": engine,
            },
            "optimization": {**optimization, "learning_rate": 1e-3, "max_steps": 6},
        },
        "rl": {
            "rollouts": {"problems": 2, "samples": 4, "generation": generation, "engine": engine},
            "optimization": {**optimization, "learning_rate": 1e-3, "steps": 5},
        },
        "evaluate": {"problems": 4, "generation": generation, "engine": engine},
        "compute": {
            "device": "cpu",
            "precision": "fp32",
            "threads": 1,
            "gradient_checkpointing": True,
        },
        "report": {"checkpoint_every": 2},
    }
