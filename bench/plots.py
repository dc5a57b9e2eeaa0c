"""Pictures of benchmark results: what is slow, how it grows, where the time goes.

Each function draws what the setups hold and returns whether there was enough for a picture. A
line's name stands right of the axes in the line's colour; ours is blue and thick.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from bench.record import Row

MOST_PANELS = 2
LABEL_GAP = 0.048  # between the middles of two names, as a share of the axes' height
OURS_COLOR, OURS_OTHERS = "#1f5fbf", ("#7fa8dd", "#5fb3b3", "#9d8fd6", "#8fb8a0")
# From the left of a name to the end of its line.
LEADER = {"arrowstyle": "-", "linewidth": 0.5, "relpos": (0, 0.5), "shrinkA": 2, "shrinkB": 4}
PEER_COLORS = ("#c8452d", "#e08a1e", "#8a5a44", "#b0508f", "#6b6b6b", "#4d7f2a", "#a68a00")
# In the order they are stacked; what the model itself takes is no cost of ours.
PARTS = {
    "model": "#b9c4d0",
    "attention": OURS_COLOR,
    "plan": "#e08a1e",
    "orchestration": "#c8452d",
    "sampling": "#6aa36a",
}
FORK = re.compile(r"fork-\d+x\d+-(.+)")


class Setup(NamedTuple):
    """One setup of a suite: its key, and by peer the row that was right and timed."""

    key: Row
    rows: dict[str, Row]


class Line(NamedTuple):
    """A peer's times, milliseconds, in order of x."""

    name: str
    ours: bool
    xs: list[float]
    ms: list[float]


class End(NamedTuple):
    """Where a line ends, and how its name is written there."""

    name: str
    x: float
    ms: float
    color: str
    weight: str


def plot_attention(setups: Sequence[Setup], path: Path) -> bool:
    """Forward and backward against the number of tokens, for the kind of trie with most sizes; the
    backward pass alone where that was timed by itself."""
    passes = [s.key.get("pass") for s in setups]
    what = "bwd" if "fwd+bwd" not in passes else "fwd+bwd"
    chosen = [s for s in setups if s.key.get("pass") == what]
    kind, chosen = _largest_family(chosen, lambda s: s.key["case"].rpartition("-")[0], "n")
    panels = []
    for title, of_panel in _panels(chosen, "n"):
        lines = _lines(of_panel, "n")
        floor = _roofline(of_panel, "n")
        panels.append((f"{kind}, {title}", lines, floor))
    label = "backward, ms" if what == "bwd" else "forward + backward, ms"
    return _draw(panels, "tokens of the trie", label, path)


def plot_decode(setups: Sequence[Setup], path: Path) -> bool:
    """One step against the number of live threads that share one prefix."""
    forks = [s for s in setups if FORK.fullmatch(s.key["case"])]
    sizes, chosen = _largest_family(forks, lambda s: FORK.sub(r"\1", s.key["case"]), "sequences")
    prefix, _, suffix = sizes.partition("+")
    panels = []
    for title, of_panel in _panels(chosen, "sequences"):
        floor = _roofline(of_panel, "sequences")
        panels.append((title, _lines(of_panel, "sequences"), floor))
    label = f"live threads, {int(prefix or 0):,} shared tokens + {suffix} of their own"
    return _draw(panels, label, "one step of one layer, ms", path)


def plot_rollout(setups: Sequence[Setup], path: Path) -> bool:
    """Where the time of a forward pass goes, for each row that says so."""
    bars = [
        (f"{s.key['case']}, {s.key['model']}\n{peer}", row)
        for s in setups
        for peer, row in s.rows.items()
        if "model_share" in row
    ][::-1]
    if not bars:
        return False
    figure, axis = plt.subplots(figsize=(9, 0.62 * len(bars) + 1.3), layout="constrained")
    left = np.zeros(len(bars))
    names = [name for name, _ in bars]
    for part, color in PARTS.items():
        shares = np.array([100 * row[f"{part}_share"] for _, row in bars])
        axis.barh(names, shares, left=left, color=color, label=part, height=0.62)
        for y, (share, start) in enumerate(zip(shares, left, strict=True)):
            if share >= 3:
                text = "white" if part in ("attention", "orchestration") else "black"
                axis.text(
                    start + share / 2, y, f"{share:.0f}", ha="center", va="center", color=text
                )
        left += shares
    for y, (_, row) in enumerate(bars):
        axis.text(101, y, f"{row['ms_per_step']:.3g} ms", va="center", fontweight="bold")
    axis.text(101, len(bars) - 0.45, "a step", va="bottom", fontsize="small")
    axis.set_xlim(0, 100)
    axis.set_xlabel("% of a step")
    axis.legend(
        frameon=False, ncols=len(PARTS), loc="lower left", bbox_to_anchor=(0, 1), fontsize="small"
    )
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def _largest_family(setups: Sequence[Setup], family: Any, x: str) -> tuple[str, list[Setup]]:
    """The family whose setups have most values of x, and its setups; the first of equals."""
    families: dict[str, list[Setup]] = {}
    for setup in setups:
        families.setdefault(family(setup), []).append(setup)
    if not families:
        return "", []
    return max(families.items(), key=lambda item: len({s.key[x] for s in item[1]}))


def _panels(setups: Sequence[Setup], x: str) -> list[tuple[str, list[Setup]]]:
    """The setups that differ in x alone, with a title; of those that hold several values of it, the
    last MOST_PANELS (the largest)."""
    groups: dict[str, list[Setup]] = {}
    for setup in setups:
        names = [n for n in ("heads", "kv_heads", "head_dim") if n in setup.key]
        sizes = [f"{n.replace('_', ' ')} {setup.key[n]}" for n in names]
        groups.setdefault(", ".join([setup.key["dtype"], *sizes]), []).append(setup)
    lines = [item for item in groups.items() if len({s.key[x] for s in item[1]}) > 1]
    return lines[-MOST_PANELS:]


def _lines(setups: Sequence[Setup], x: str) -> list[Line]:
    lines = []
    peers = dict.fromkeys(itertools.chain(*(s.rows for s in setups)))
    for peer in peers:
        points = sorted((s.key[x], s.rows[peer]["ms"]) for s in setups if peer in s.rows)
        ours = any(s.rows[peer]["ours"] for s in setups if peer in s.rows)
        xs, ms = zip(*points, strict=True)
        lines.append(Line(peer, ours, list(xs), list(ms)))
    return lines


def _roofline(setups: Sequence[Setup], x: str) -> Line | None:
    """What our calls would take at the roofline of their run; None where none was measured."""
    points = sorted(
        (s.key[x], row["ms"] * row["roofline"])
        for s in setups
        for row in itertools.islice(s.rows.values(), 1)
        if row.get("roofline")
    )
    if not points:
        return None
    xs, ms = zip(*points, strict=True)
    return Line("roofline", True, list(xs), list(ms))


def _draw(
    panels: Iterable[tuple[str, list[Line], Line | None]], x_label: str, y_label: str, path: Path
) -> bool:
    """Times against x, both logarithmic; False if no line has two points."""
    panels = [p for p in panels if any(len(line.xs) > 1 for line in p[1])]
    if not panels:
        return False
    figure, axes = plt.subplots(
        *(1, len(panels)),
        figsize=(1.2 + 5.4 * len(panels), 4.4),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    ends = []
    for axis, (title, lines, floor) in zip(axes[0], panels, strict=True):
        ends.append(_plot_lines(axis, lines, floor))
        axis.set_title(title, fontsize="medium")
        axis.set_xlabel(x_label)
    axes[0][0].set_ylabel(y_label)
    # The panels share the limits of y, which are known only now.
    for axis, of_panel in zip(axes[0], ends, strict=True):
        _name_lines(axis, of_panel)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def _plot_lines(axis: Axes, lines: list[Line], floor: Line | None) -> list[End]:
    """Draws the lines; returns where each ends, in the order of drawing."""
    ours_colors, peer_colors = itertools.cycle(OURS_OTHERS), itertools.cycle(PEER_COLORS)
    ends = []
    for i, line in enumerate(sorted(lines, key=lambda line: not line.ours)):
        first = i == 0 and line.ours
        color = OURS_COLOR if first else next(ours_colors if line.ours else peer_colors)
        axis.plot(
            *(line.xs, line.ms),
            color=color,
            marker="o",
            markersize=5 if first else 3.5,
            linewidth=2.8 if first else 1.3,
            zorder=3 if first else 2,
        )
        ends.append(End(line.name, line.xs[-1], line.ms[-1], color, "bold" if first else "normal"))
    if floor:
        axis.plot(floor.xs, floor.ms, color="black", linestyle="--", linewidth=1.2)
        ends.append(End(floor.name, floor.xs[-1], floor.ms[-1], "black", "normal"))
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axis.set_xticks(sorted({x for line in lines for x in line.xs}))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    return ends


def _name_lines(axis: Axes, ends: list[End]) -> None:
    """Writes the names right of the axes, each as high as its line ends, or as near as the others
    leave room, with a thin line to that end."""
    low, high = np.log(axis.get_ylim())
    heights = apart([(math.log(end.ms) - low) / (high - low) for end in ends])
    for end, height in zip(ends, heights, strict=True):
        axis.annotate(
            end.name,
            xy=(end.x, end.ms),
            xytext=(1.05, height),
            textcoords="axes fraction",
            color=end.color,
            fontweight=end.weight,
            fontsize="small",
            va="center",
            annotation_clip=False,
            arrowprops=LEADER | {"color": end.color},
        )


def apart(heights: Sequence[float], gap: float = LABEL_GAP) -> list[float]:
    """The heights, in [0, 1], moved so that no two are nearer than `gap`; their order stays."""
    order = np.argsort(heights, kind="stable")
    moved = np.asarray(heights, dtype=float)[order]
    for i in range(1, len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + gap)
    ceiling = 1.0
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], ceiling)
        ceiling = moved[i] - gap
    return moved[np.argsort(order)].tolist()
