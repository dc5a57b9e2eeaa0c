"""Checking and timing the peers of one setup.

Every peer is prepared, its results on every set of inputs are checked, and only a peer that was
right is timed: after a warm-up, in interleaved repeats (one sample of each peer in turn, each round
starting at another peer), so that a slow spell of the machine affects all peers alike.

A row's `status`:
    ok       right, and timed
    wrong    some result differs from the reference; not timed; `reason` says where
    skipped  the peer does not support this setup, or its memory is too small; `reason` says why
    failed   an exception; `reason` is its first line

Where a setup counts the work of a call (bench/roofline.py), its rows also have the rates and the
share of the roofline. Each timed row has `ratios`: how many times faster it is than each other
timed peer.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from bench.meter import CpuMeter, CudaMeter
from bench.roofline import rates
from bench.suite import Peer, Row, S, Skip, UsageError

MIN_REPEATS, MAX_REPEATS = 3, 50
SAMPLE_DIGITS = 4
# A call slower than this many budgets is timed once: its relative noise is small, its cost is not.
ONE_SHOT = 5


def measure(
    setup: S,
    peers: Sequence[Peer[S]],
    meter: CpuMeter | CudaMeter,
    budget: float,
    roofline: Row,
    show: Callable[[str, float | None], None],
) -> list[Row]:
    """One row for each peer, in order.

    Args:
        budget: seconds of timing per row.
        roofline: as measure_roofline returns it.
        show: called before each action, with its name and its expected seconds (None if unknown);
            never during a sample.
    """
    rows, timed = [], []
    for peer in peers:
        row: Row = {**setup.key, "peer": peer.name, "ours": peer.ours, "status": "ok"}
        row |= dict.fromkeys(("reason", "ms", "iqr_ms", "samples_ms", "repeats", "peak_bytes"))
        rows.append(row)
        with _outcome(row):
            show(f"preparing {peer.name}", None)
            call = peer.prepare(setup)
            for i in range(setup.input_sets):
                show(f"checking {peer.name}", None)
                if wrong := setup.check(peer.name, call(i), i):
                    row |= {"status": "wrong", "reason": f"{wrong} (inputs {i})"}
                    break
            else:
                timed.append(_Timing(row, call, setup.input_sets, meter))
    gc.collect()
    gc.disable()  # as timeit does: no peer is charged for collecting another's objects
    try:
        for timing in timed:
            with _outcome(timing.row):  # memory may run out now that all peers hold theirs
                show(f"measuring the memory of {timing.peer}", None)
                timing.measure_memory()
                show(f"warming up {timing.peer}", None)
                timing.warm_up(budget)
        timed = [timing for timing in timed if timing.row["status"] == "ok"]
        rounds = max((timing.repeats for timing in timed), default=0)
        for round_ in range(rounds):
            shift = round_ % len(timed)
            for timing in timed[shift:] + timed[:shift]:
                if timing.is_due:
                    what = f"timing {timing.peer}, round {round_ + 1}/{rounds}"
                    show(what, timing.seconds_of_sample)
                    timing.sample()
    finally:
        gc.enable()
    for timing in timed:
        timing.finish()
        peer, seconds = timing.peer, timing.row["ms"] / 1e3
        timing.row |= rates(setup.work(peer), seconds, roofline) | setup.figures(peer, seconds)
    ok = {timing.peer: timing.row for timing in timed}
    for peer, row in ok.items():
        row["ratios"] = {p: other["ms"] / row["ms"] for p, other in ok.items() if p != peer}
    return rows


@contextmanager
def _outcome(row: Row) -> Iterator[None]:
    """Enters what is raised, unless it is a UsageError, as the row's status and reason."""
    try:
        yield
    except UsageError:
        raise
    except torch.OutOfMemoryError:
        row |= {"status": "skipped", "reason": "does not fit in the device's memory"}
    except Skip as reason:
        row |= {"status": "skipped", "reason": str(reason)}
    except Exception as error:
        line = (str(error).strip().splitlines() or [""])[0]
        row |= {"status": "failed", "reason": f"{type(error).__name__}: {line}"}


class _Timing:
    """The samples of one row.

    Attributes:
        repeats: number of samples to take; known after the warm-up.
        seconds_of_sample: expected duration of a sample, from the warm-up.
    """

    def __init__(
        self,
        row: Row,
        call: Callable[[int], Any],
        input_sets: int,
        meter: CpuMeter | CudaMeter,
    ):
        self.row, self._call, self._input_sets, self._meter = row, call, input_sets, meter
        self.repeats, self.seconds_of_sample = 1, 0.0
        self._count, self._calls = 0, 1
        self._samples: list[float] = []

    @property
    def peer(self) -> str:
        return self.row["peer"]

    @property
    def is_due(self) -> bool:
        """Whether it lacks samples."""
        return len(self._samples) < self.repeats

    def measure_memory(self) -> None:
        """Enters the peak memory of one call."""
        self.row["peak_bytes"] = self._meter.peak_bytes(self._next)

    def warm_up(self, budget: float) -> None:
        """Times one call and derives the number of repeats from it."""
        self.sample()
        [seconds] = self._samples
        if seconds > ONE_SHOT * budget:
            return
        self._samples.clear()
        self._calls = self._meter.calls_in_sample(seconds)
        self.seconds_of_sample = self._calls * seconds
        fits = int(budget / self.seconds_of_sample)
        self.repeats = min(max(fits, MIN_REPEATS), MAX_REPEATS)

    def sample(self) -> None:
        self._samples.append(self._meter.seconds(self._next, self._calls))

    def finish(self) -> None:
        """Enters median, interquartile range and samples, in milliseconds."""
        low, median, high = (1e3 * np.percentile(self._samples, (25, 50, 75))).tolist()
        samples = [float(f"{1e3 * seconds:.{SAMPLE_DIGITS}g}") for seconds in self._samples]
        self.row |= {"ms": median, "iqr_ms": high - low, "samples_ms": samples}
        self.row["repeats"] = len(samples)

    def _next(self) -> Any:
        self._count += 1
        return self._call(self._count % self._input_sets)
