"""Pictures of a pipeline: its stages side by side, and P-GRPO step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from threadweaver.evaluate.grade import METRICS
from threadweaver.train.log import read_metrics

SHARES = (("accuracy", "accuracy"), ("format", "format correct"), ("activation", "activation"))


def plot_stages(stages: dict[str, Any], path: Path) -> None:
    """Shares, token counts and what threads gain after each stage."""
    names = [name.replace("_", "-") for name in stages]
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    left, middle, right = axes
    parallel = [stage["parallel"] for stage in stages.values()]
    sequential = [stage["sequential"] for stage in stages.values()]
    for key, label in SHARES:
        left.plot(names, [100 * p[key] for p in parallel], marker="o", label=label)
    left.plot(
        names,
        [100 * s["accuracy"] for s in sequential],
        marker="o",
        linestyle=":",
        label="accuracy, sequential mode",
    )
    left.set_ylabel("% of held-out problems")
    left.set_ylim(top=103)
    for source, key, label, style in (
        (sequential, "total_tokens", "all tokens, sequential mode", ":"),
        (parallel, "total_tokens", "all tokens", "-"),
        (parallel, "longest_path_tokens", "longest path", "-"),
    ):
        middle.plot(names, [s[key] for s in source], marker="o", linestyle=style, label=label)
    middle.set_ylabel("tokens, mean")
    middle.set_ylim(bottom=0)
    speedups = [
        s["total_tokens"] / p["longest_path_tokens"]
        for s, p in zip(sequential, parallel, strict=True)
    ]
    right.plot(names, speedups, marker="o", label="all tokens, sequential mode / longest path")
    right.set_ylabel("token-latency speed-up")
    right.set_ylim(bottom=1)
    _save(figure, axes, path)


def plot_rl(metrics: Path, path: Path) -> None:
    """Reward and its parts, shares, and lengths over the steps of a run of P-GRPO; with
    markers, those of held-out problems."""
    records = read_metrics(metrics)
    steps = [record["step"] for record in records]
    validated = [r for r in records if "validation_parallel_accuracy" in r]
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    for axis, series, label in (
        (axes[0], (("reward", "reward"), ("reward_correct", "for the answer")), "reward, mean"),
        (axes[1], SHARES, "% of rollouts"),
        (
            axes[2],
            (("total_tokens", "all tokens"), ("longest_path_tokens", "longest path")),
            "tokens, mean",
        ),
    ):
        scale = 100 if label.startswith("%") else 1
        for key, name in series:
            [line] = axis.plot(steps, [scale * record[key] for record in records], label=name)
            if not validated or key not in METRICS:
                continue
            modes = [("parallel", "o", "")]
            if key in ("accuracy", "total_tokens"):
                modes.append(("sequential", "x", ", sequential mode"))
            for mode, marker, of_mode in modes:
                axis.plot(
                    [record["step"] for record in validated],
                    [scale * record[f"validation_{mode}_{key}"] for record in validated],
                    marker=marker,
                    linestyle=":",
                    color=line.get_color(),
                    label=f"{name}, held out{of_mode}",
                )
        axis.set_xlabel("step")
        axis.set_ylabel(label)
    speed = axes[0].twinx()
    speed.plot(
        steps, [r["reward_speed"] for r in records], color="tab:green", label="for speed (right)"
    )
    speed.set_ylim(bottom=0)
    speed.legend(loc="lower center", frameon=False)
    axes[2].set_ylim(bottom=0)
    _save(figure, axes, path)


def _save(figure: Any, axes: tuple[Axes, ...] | Any, path: Path) -> None:
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize="small")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
