"""P-GRPO for 200 steps on a file as people have them: prompts that do not fit, odd rows that load,
groups without a signal, answers whose grading does not end."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest

from threadweaver.tasks import Problem, load_task
from threadweaver.train.rl import RLTrainer

from .conftest import ARCH, Run

NEVER = "no number"
ENDLESS = "</think>\\boxed{9^{9^{9^{9}}}}"


def write_rows(path: Path) -> int:
    """The file; returns how many of its prompts do not fit a context of 200 tokens."""
    rows = [{"question": f"{i}?\n", "ground_truth": "7"} for i in range(60)]
    rows += [{"question": f"never {i}?\n", "ground_truth": NEVER} for i in range(20)]
    too_long = [{"question": f"{i} {'x' * 300}", "ground_truth": "7"} for i in range(10)]
    odd = [
        {"question": "a number?", "ground_truth": 7},
        {"question": "an exact one?", "reward_model": {"ground_truth": 0.1, "style": "rule"}},
        {"question": "  spaces \t ?\r\n", "ground_truth": " 7 ", "source": None, "extra": [1, {}]},
        {"question": "Wie viel? 七 🙂 \u202e", "ground_truth": "\\frac{1}{2}"},
        {"prompt": [{"role": "user", "content": "chat?"}], "ground_truth": "7"},
        {"question": "a broken one?", "response": "<Thread>", "ground_truth": "7"},
        {"question": "0?\n", "ground_truth": "7"},
    ]
    lines = [json.dumps(row) for row in (*rows, *too_long, *odd)]
    path.write_bytes("\r\n".join(lines).encode())
    return len(too_long)


class ByTheFirstLetter:
    """The rows of a file, where about every other answer of a model that knows nothing is right."""

    def __init__(self, path: str):
        self.file = load_task(path, held_out=0.2, seconds=0.5)
        self.slow = 0

    @property
    def ungraded(self) -> int:
        return self.file.ungraded

    def problems(self, split, n, seed=0) -> list[Problem]:
        return self.file.problems(split, n, seed)

    def is_correct(self, response: str, problem: Problem) -> bool:
        if sum(map(ord, response)) % 500 == 0:
            self.slow += 1
            return self.file.is_correct(ENDLESS, problem)
        return problem.answer != NEVER and response[:1] < "@"

    def demonstration(self, problem: Problem, parallel: bool) -> None:
        return None


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.slow
def test_a_long_run_ends_with_everything_counted_validated_and_flat_memory(
    tmp_path, monkeypatch, capsys
):
    path = tmp_path / "rows.jsonl"
    too_long = write_rows(path)
    task = ByTheFirstLetter(str(path))
    monkeypatch.setattr("threadweaver.train.rl.load_task", lambda *_, **__: task)
    memory = []
    step = RLTrainer.train_step

    def watch(self):
        record = step(self)
        memory.append(resident_bytes())
        return record

    monkeypatch.setattr(RLTrainer, "train_step", watch)
    run = Run(
        "rl",
        tmp_path / "run",
        model={"arch": {**ARCH, "max_position_embeddings": 200}},
        rollouts={
            "problems": 4,
            "samples": 4,
            "refill": True,
            "generation": {"max_tokens": 16},
            "engine": {"kv_gigabytes": 0.01},
        },
        reward={"accel": "none"},
        optimization={"steps": 200, "batch_tokens": 512, "learning_rate": 1e-3},
        evaluate={
            "problems": 8,
            "generation": {"max_tokens": 16},
            "engine": {"kv_gigabytes": 0.01},
        },
        report={"validate_every": 20, "checkpoint_every": 50},
    )
    assert run() == 0
    records, summary = run.metrics(), run.summary()
    assert [record["step"] for record in records] == list(range(1, 201))
    shown = capsys.readouterr().out
    skipped = summary["skipped_prompts"]
    assert 0 < skipped <= too_long
    assert f"training problems: {skipped} of " in shown
    for name in ("groups", "no_signal_groups"):
        assert summary[name] == sum(record[name] for record in records) > 0
    for record in records:
        assert 4 <= record["groups"] <= 12
    validated = [r for r in records if "validation_parallel_accuracy" in r]
    assert [record["step"] for record in validated] == list(range(20, 201, 20))
    ungraded = sum(record["ungraded"] for record in records)
    for mode in ("parallel", "sequential"):
        ungraded += sum(record[f"validation_{mode}_ungraded"] for record in validated)
    assert ungraded == task.ungraded == task.slow > 0
    # The first half fills caches; the second holds what it had.
    grown = max(memory[100:]) - max(memory[:100])
    counts = {name: summary[name] for name in ("skipped_prompts", "groups", "no_signal_groups")}
    resident = ", ".join(f"{memory[i] / 1e6:.1f} MB" for i in (0, 99, 199))
    print(f"{counts}, {ungraded} ungraded, {summary['seconds']:.0f} s")
    print(
        f"resident after step 1, 100 and 200: {resident}; the second half grew by {grown:,} bytes"
    )
    assert grown < 10e6
