"""The figures of a folder: yield by step, acceleration, tokens, money."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, median
from typing import Any

from threadweaver.annotate.failures import LeftOut
from threadweaver.annotate.settings import TeacherSettings
from threadweaver.annotate.store import STEPS, Store, read_json

ASKING = ("1-map", "3-independent", "4-outline")
ALL_STEPS = (*STEPS, "5-keep")


def summarize(
    total: int,
    rejected: Sequence[LeftOut],
    rows: Sequence[Mapping[str, Any]],
    store: Store,
    numbers: Iterable[int],
    settings: TeacherSettings,
) -> dict[str, Any]:
    """Everything for summary.json.

    Args:
        total: problems.
        rejected: one for each that is not kept.
        numbers: of problems that may have files.
    """
    left = Counter(reason.step for reason in rejected)
    steps: dict[str, dict[str, Any]] = {}
    rest = total
    for step in ALL_STEPS:
        rest -= left[step]
        steps[step] = {"passed": rest}
    threads = Counter()
    for step in ASKING:
        steps[step] |= _asked(store, step, numbers, threads)
    prompt_tokens, completion_tokens = (
        sum(steps[step][name] for step in ASKING) for name in ("prompt_tokens", "completion_tokens")
    )
    accelerations = [row["acceleration"] for row in rows]
    return {
        "problems": total,
        "kept": len(rows),
        "steps": steps,
        "rejected": dict(Counter(reason.reason for reason in rejected).most_common()),
        # What is known of the first of each.
        "details": {r.reason: r.detail for r in reversed(rejected) if r.detail},
        "threads_unchanged": threads["unchanged"],
        "blocks_dissolved": threads["dissolved"],
        "acceleration": fmean(accelerations) if rows else None,
        "acceleration_median": median(accelerations) if rows else None,
        "threads_per_block": fmean(row["mean_threads_per_block"] for row in rows) if rows else None,
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "cost": (prompt_tokens * settings.input_price + completion_tokens * settings.output_price)
        / 1e6,
    }


def _asked(store: Store, step: str, numbers: Iterable[int], threads: Counter) -> dict[str, Any]:
    """What a step asked for in all files, and the breaches of its replies by kind."""
    sums: Counter[str] = Counter()
    breaches: Counter[str] = Counter()
    for path in (store.path(step, number) for number in numbers):
        if not path.exists():
            continue
        record = read_json(path, "exchanges", "breaches")
        breaches.update(breach["kind"] for breach in record["breaches"])
        for name in ("unchanged", "dissolved"):
            threads[name] += len(record.get(name, ()))
        for exchange in record["exchanges"]:
            sums["requests"] += 1
            for name in ("retries", "prompt_tokens", "completion_tokens"):
                sums[name] += exchange["reply"][name]
    names = ("requests", "retries", "prompt_tokens", "completion_tokens")
    return {**{name: sums[name] for name in names}, "breaches": dict(breaches)}
