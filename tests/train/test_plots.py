"""What the picture of a run of P-GRPO shows."""

from __future__ import annotations

import json

import pytest

from threadweaver.evaluate.grade import METRICS
from threadweaver.train import plots


@pytest.mark.parametrize("validated", [[], [2, 4]])
def test_held_out_problems_stand_beside_the_rollouts(tmp_path, monkeypatch, validated):
    figures = dict.fromkeys(("reward", "reward_correct", "reward_speed", *METRICS), 0.5)
    held_out = {
        f"validation_{mode}_{name}": value
        for mode, value in (("parallel", 0.6), ("sequential", 0.7))
        for name in METRICS
    }
    records = [
        {"step": step, **figures, **(held_out if step in validated else {})} for step in range(1, 5)
    ]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    lines = {}
    save = plots._save

    def watch(figure, axes, path):
        for axis in axes:
            lines.update({line.get_label(): line for line in axis.lines})
        save(figure, axes, path)

    monkeypatch.setattr(plots, "_save", watch)
    plots.plot_rl(metrics, tmp_path / "rl.png")
    assert (tmp_path / "rl.png").stat().st_size > 10_000
    shown = {
        name: (list(line.get_xdata()), list(line.get_ydata()))
        for name, line in lines.items()
        if "held out" in name
    }
    if not validated:
        assert not shown
        return
    assert shown["accuracy, held out"] == ([2, 4], [60, 60])
    assert shown["accuracy, held out, sequential mode"] == ([2, 4], [70, 70])
    assert shown["longest path, held out"] == ([2, 4], [0.6, 0.6])
    assert shown["all tokens, held out, sequential mode"] == ([2, 4], [0.7, 0.7])
