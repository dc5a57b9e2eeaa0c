"""Pictures of benchmark results: what is slow, how it grows, where the time goes.

Each function draws what the setups hold and returns whether there was enough for a picture. A
line's name stands at its end, in its colour; ours is blue and thick.
"""

from __future__ import annotations

import itertools
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
OURS_COLOR, OURS_OTHERS = "#1f5fbf", ("#7fa8dd", "#5fb3b3", "#9d8fd6", "#8fb8a0")
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


def plot_attention(setups: Sequence[Setup], path: Path) -> bool:
    """Forward and backward against the number of tokens, for the kind of trie with most sizes."""
    chosen = [s for s in setups if s.key.get("pass") == "fwd+bwd"]
    kind, chosen = _largest_family(chosen, lambda s: s.key["case"].rpartition("-")[0], "n")
    panels = []
    for title, of_panel in _panels(chosen, ("dtype", "head_dim")):
        lines = _lines(of_panel, "n")
        floor = _roofline(of_panel, "n")
        panels.append((f"{kind}, {title}", lines, floor))
    return _draw(panels, "tokens of the trie", "forward + backward, ms", path)


def plot_decode(setups: Sequence[Setup], path: Path) -> bool:
    """One step against the number of live threads that share one prefix."""
    forks = [s for s in setups if FORK.fullmatch(s.key["case"])]
    sizes, chosen = _largest_family(forks, lambda s: FORK.sub(r"\1", s.key["case"]), "sequences")
    prefix, _, suffix = sizes.partition("+")
    panels = []
    for title, of_panel in _panels(chosen, ("dtype", "heads", "kv_heads", "head_dim")):
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


def _panels(setups: Sequence[Setup], names: tuple[str, ...]) -> list[tuple[str, list[Setup]]]:
    """The setups that differ in x alone, with a title; the last MOST_PANELS (the largest)."""
    groups: dict[tuple, list[Setup]] = {}
    for setup in setups:
        groups.setdefault(tuple(setup.key[name] for name in names), []).append(setup)
    titles = [
        ", ".join(
            str(v) if n == "dtype" else f"{n.replace('_', ' ')} {v}"
            for n, v in zip(names, values, strict=True)
        )
        for values in groups
    ]
    return list(zip(titles, groups.values(), strict=True))[-MOST_PANELS:]


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
    for axis, (title, lines, floor) in zip(axes[0], panels, strict=True):
        _panel(axis, title, lines, floor)
        axis.set_xlabel(x_label)
    axes[0][0].set_ylabel(y_label)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def _panel(axis: Axes, title: str, lines: list[Line], floor: Line | None) -> None:
    ours_colors, peer_colors = itertools.cycle(OURS_OTHERS), itertools.cycle(PEER_COLORS)
    ends: list[tuple[float, float, str, str, str]] = []
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
        ends.append((line.xs[-1], line.ms[-1], line.name, color, "bold" if first else "normal"))
    if floor:
        axis.plot(floor.xs, floor.ms, color="black", linestyle="--", linewidth=1.2)
        ends.append((floor.xs[-1], floor.ms[-1], floor.name, "black", "normal"))
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    xs = sorted({x for line in lines for x in line.xs})
    axis.set_xticks(xs)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_title(title, fontsize="medium")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    low, high = (
        min(m for line in lines for m in line.ms),
        max(m for line in lines for m in line.ms),
    )
    heights = _apart([end[1] for end in ends], gap=(high / low) ** (1 / 18))
    for (_, _, name, color, weight), y in zip(ends, heights, strict=True):
        axis.annotate(
            name,
            (1.02, y),
            xycoords=("axes fraction", "data"),
            color=color,
            fontweight=weight,
            fontsize="small",
            va="center",
            annotation_clip=False,
        )


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """The heights, moved up where need be so that each is `gap` times the next lower one."""
    order = np.argsort(heights)
    moved = np.array(heights, dtype=float)
    for lower, upper in itertools.pairwise(order):
        moved[upper] = max(moved[upper], moved[lower] * gap)
    return moved.tolist()
