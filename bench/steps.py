"""Running a list of commands in a fixed time, with a summary that survives an interruption.

Steps run one after another, each a process with a share of the time that is left. A step writes
OUT/NAME.log and, if it takes --json, its results to OUT/NAME.json. OUT/summary.json is rewritten
after every step: status (ok, failed, timed out, interrupted, left out), reason, seconds, exit code,
command. A later run with the same folder repeats, with files of another number, those that had no
time to end; what is ok or failed stays, unless it is named.

A step ends with its runner, even a killed one.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from bench.environment import REPOSITORY
from bench.record import write_json
from threadweaver.progress import Status

RESERVED_SECONDS = 15  # kept back for steps with `always`
LEAST_SECONDS = 3  # a step with less time is left out
GRACE_SECONDS = 5  # between SIGTERM and SIGKILL
LOOK_SECONDS = 1  # between two updates of the status of a running step
ENDED = ("ok", "failed")  # what would end in the same way again
PR_SET_PDEATHSIG = 1  # of Linux's sys/prctl.h


class Step(NamedTuple):
    """A process to run.

    Attributes:
        share: the largest part of the remaining time that it may take.
        writes: whether it takes --json FILE for its results.
        by_case: whether it is a suite, which writes after each case: one that was cut goes on after
            the cases that it has written.
        absent: why it cannot run here; it is then left out.
        always: runs again in each run that continues a folder, even without time left.
        is_blocking: whether, if the step is not ok, no later step can run; called after it.
    """

    name: str
    command: list[str]
    share: float
    writes: bool = False
    by_case: bool = False
    absent: str | None = None
    always: bool = False
    is_blocking: Callable[[], bool] = lambda: False


class SummaryError(ValueError):
    """A summary.json of another program; the message names it."""


class StepRunner:
    """The steps of one folder and their outcomes.

    Args:
        out: the folder; if it holds the summary of an earlier run, that run is continued.
        budget: seconds for this run.
        env: variables of every step, beside those of this process.
        entered: called after the outcome of each step has been entered.

    Attributes:
        entries: step -> its entry in the summary.

    Raises:
        SummaryError: there is a summary that cannot be read.
    """

    def __init__(
        self,
        out: Path,
        budget: float,
        env: Mapping[str, str] | None = None,
        entered: Callable[[StepRunner], None] = lambda runner: None,
    ):
        self.out, self._env, self._entered = out, env or {}, entered
        self._end = time.monotonic() + budget
        self._summary = out / "summary.json"
        self._status = Status(Console(stderr=True))
        self.entries: dict[str, dict[str, Any]] = {}
        if self._summary.exists():
            try:
                steps = json.loads(self._summary.read_text(encoding="utf-8"))["steps"]
                self.entries = {entry["step"]: entry for entry in steps}
            except (ValueError, LookupError, TypeError) as error:
                raise SummaryError(
                    f"{self._summary}: not a summary of bench gpu: take it away, or its folder"
                ) from error

    def run(self, steps: Sequence[Step], again: Sequence[str] = ()) -> bool:
        """Runs the steps that have not ended yet, and those named in `again`; returns whether none
        failed.

        Raises:
            KeyboardInterrupt: the running step has been ended and entered as interrupted.
        """
        for step in steps:
            earlier = self.entries.get(step.name, {})
            needed = step.name in again or (step.always and not step.absent)
            if earlier.get("status") in (("ok",) if step.always else ENDED) and not needed:
                continue
            if step.absent and step.name not in again:
                self._enter(step.name, {"status": "left out", "reason": step.absent})
                continue
            left = self._end - time.monotonic() - (0 if step.always else RESERVED_SECONDS)
            if left * step.share < LEAST_SECONDS and not step.always:
                if not earlier:
                    self._enter(step.name, {"status": "left out", "reason": "no time was left"})
                continue
            entry = self._run(step, max(left * step.share, LEAST_SECONDS), earlier)
            if entry["status"] != "ok" and step.is_blocking():
                break
        return all(
            self.entries[s.name]["status"] != "failed" for s in steps if s.name in self.entries
        )

    def _run(self, step: Step, seconds: float, earlier: dict[str, Any]) -> dict[str, Any]:
        tries = earlier.get("tries", 0)
        names = [step.name, *(f"{step.name}-{number}" for number in range(2, tries + 2))]
        *files, file = (self.out / f"{name}.json" for name in names)
        results = ["--json", str(file)] if step.writes else []
        done = [str(path) for path in files if path.exists()]
        if step.by_case and done and earlier["status"] not in ENDED:
            results += ["--without", json.dumps(done)]
        name = names[-1]
        entry: dict[str, Any] = {
            "status": "interrupted",
            "reason": None,
            "exit_code": None,
            "command": [*step.command, *results],
            "log": f"{name}.log",
            "tries": tries + 1,
        }
        env = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", **self._env}
        start = time.monotonic()
        with (self.out / entry["log"]).open("wb") as log:
            process = subprocess.Popen(
                entry["command"],
                cwd=REPOSITORY,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,
                preexec_fn=_end_with_parent,
            )
            try:
                code = entry["exit_code"] = self._wait(process, step.name, seconds)
                entry["status"] = "ok" if code == 0 else "failed"
                if code:
                    entry["reason"] = f"exit code {code}: see {entry['log']}"
            except subprocess.TimeoutExpired:
                entry |= {"status": "timed out", "reason": f"after {seconds:.0f} s"}
            finally:
                _end(process)
                entry["seconds"] = round(time.monotonic() - start, 1)
                self._enter(step.name, entry)
        return entry

    def _wait(self, process: subprocess.Popen, name: str, seconds: float) -> int:
        """The exit code. Raises TimeoutExpired if the process has not ended after `seconds`."""
        start = time.monotonic()
        with self._status:
            while True:
                passed = time.monotonic() - start
                self._status.show(f"{name}: {passed:.0f} s, at most {seconds:.0f} s")
                try:
                    return process.wait(min(LOOK_SECONDS, max(seconds - passed, 0)))
                except subprocess.TimeoutExpired:
                    if time.monotonic() - start >= seconds:
                        raise

    def _enter(self, name: str, entry: dict[str, Any]) -> None:
        """Prints the outcome of a step and rewrites the summary."""
        self.entries[name] = {"step": name, **entry}
        write_json(self._summary, {"steps": list(self.entries.values())})
        seconds = f"{entry['seconds']:.0f} s" if "seconds" in entry else ""
        print(f"{name:<18} {entry['status']:<12} {seconds:>6}  {entry['reason'] or ''}", flush=True)
        self._entered(self)


# Loaded here: between fork and exec nothing is imported.
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def _end_with_parent() -> None:
    """Called in the process of a step: the kernel kills it once its parent has ended."""
    if _libc:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _end(process: subprocess.Popen) -> None:
    """Ends a process and its process group."""
    for number, wait in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            continue
