"""The page of a run: its curves, stages, rejects and samples."""

from __future__ import annotations

import time
from pathlib import Path

from threadweaver.lock import is_held
from threadweaver.view.page import as_json, build_page
from threadweaver.view.run_files import is_run, read_run
from threadweaver.whole_file import write_whole

MAX_POINTS = 2000  # of a curve: more than a screen has columns


def check_run(folder: Path) -> None:
    """Raises ValueError for a folder that holds no run."""
    if not folder.exists():
        raise ValueError(f"{folder}: no such folder; check the path")
    if not folder.is_dir():
        raise ValueError(f"{folder}: is a file; name the folder of a run (its run_dir)")
    if not is_run(folder):
        raise ValueError(
            f"{folder}: holds no run: there is no config.yaml in it; name the run_dir of a training"
        )


def run_page(folder: Path, reload_seconds: float | None = None) -> str:
    """The text of the page.

    Args:
        reload_seconds: the page reads itself anew so often; None: never.
    """
    data = read_run(folder)
    for stage in data["stages"]:
        _thin(stage)
    about = {
        "name": folder.resolve().name,
        "path": str(folder),
        "written": time.strftime("%Y-%m-%d %H:%M:%S"),
        "reload": reload_seconds,
    }
    texts = {"about": as_json(about), "run": as_json(data)}
    return build_page("run", f"{about['name']}: run", texts)


def watch(folder: Path, out: Path, seconds: float) -> None:
    """Writes the page every so many seconds until the run is finished, or was stopped or failed,
    so that no process works in its folder any more; and at the end, or when it is interrupted, once
    more, as a page that does not reload itself."""
    was_held = False
    try:
        while not (folder / "summary.json").exists():
            held = is_held(folder)
            if was_held and not held:
                break
            was_held = held
            write_whole(out, run_page(folder, seconds))
            time.sleep(seconds)
    finally:
        write_whole(out, run_page(folder))


def _thin(stage: dict) -> None:
    """Leaves MAX_POINTS of the steps, evenly, and all that have a figure few steps have."""
    steps, figures = stage["steps"], stage["figures"]
    stage["last"] = {
        name: next(v for v in reversed(column) if v is not None) for name, column in figures.items()
    }
    stage["done"] = steps[-1] if steps else 0
    if len(steps) <= MAX_POINTS:
        return
    every = len(steps) / MAX_POINTS
    kept = {int(i * every) for i in range(MAX_POINTS)} | {len(steps) - 1}
    for column in figures.values():
        present = [i for i, value in enumerate(column) if value is not None]
        if len(present) <= MAX_POINTS:
            kept.update(present)
    order = sorted(kept)
    stage["steps"] = [steps[i] for i in order]
    for name, column in figures.items():
        figures[name] = [column[i] for i in order]
