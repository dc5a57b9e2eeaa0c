"""Killed at any moment, a run goes on to the same result and asks for no reply twice."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest

from tests.annotate.problems import gym_rows, save_student, write_rows
from tests.annotate.stub import Messages, StubServer
from threadweaver.annotate.__main__ import main

pytest.importorskip("openai")
pytest.importorskip("math_verify")
pytest.importorskip("reasoning_gym")


class Runs:
    """Runs of the command, each in a process of its own: a fork, which has imported everything."""

    def __init__(self, folder: Path, count: int):
        student = save_student(folder / "student")
        data = write_rows(gym_rows(count), folder / "data.jsonl")
        self._fixed = ["--data", data, "--student", student, "--teacher.model", "stub"]

    def start(self, out: Path, server: StubServer) -> int:
        """The number of the process."""
        options = [*self._fixed, "--out", str(out), "--teacher.url", server.url]
        if child := os.fork():
            return child
        code = 70
        try:
            code = main(options)
        finally:
            os._exit(code)


@pytest.fixture
def runs(tmp_path, request, monkeypatch):
    monkeypatch.setattr("threadweaver.annotate.annotation.plot_summary", lambda *_: None)
    return Runs(tmp_path, request.param)


def wait(child: int) -> int:
    """The exit code of a process, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def key(messages: Messages) -> str:
    return json.dumps(messages)


def on_disk(out: Path) -> list[str]:
    """All requests whose reply is in the folder."""
    return [
        key(exchange["messages"])
        for step in ("1-map", "3-independent", "4-outline")
        for path in (out / step).glob("[0-9]*.json")
        for exchange in json.loads(path.read_text())["exchanges"]
    ]


def undisturbed(runs: Runs, out: Path) -> tuple[bytes, int]:
    """What is kept by a run that nobody kills, and its number of requests."""
    with StubServer() as server:
        assert wait(runs.start(out, server)) == 0
        return (out / "kept.jsonl").read_bytes(), len(server.received)


def run_once(runs: Runs, out: Path, answered: int, kill: int | None) -> StubServer:
    """One run, killed -9 when so many requests, those that runs before it were answered among them,
    are answered and their replies have reached the disk. Requests that are open then are never
    answered. None: to its end.

    It has a server of its own: a handler of a run that was killed may come late.
    """
    child, dead = 0, False

    def before_reply(_: Messages) -> bool:
        nonlocal dead
        count = answered + len(server.answered)
        if kill is not None and not dead and count >= kill:
            while len(on_disk(out)) < count:
                time.sleep(0.005)
            os.kill(child, signal.SIGKILL)
            dead = True
        return not dead

    with StubServer() as server:
        server.before_reply = before_reply
        with server.lock:
            child = runs.start(out, server)
        assert wait(child) == (0 if kill is None else -signal.SIGKILL)
    return server


@pytest.mark.parametrize(
    ("runs", "kills"),
    [
        pytest.param(4, [3, 8], id="2 kills"),
        pytest.param(20, [1, 4, 9, 15, 22, 30, 37, 44, 50, 59], id="10", marks=pytest.mark.slow),
    ],
    indirect=["runs"],
)
def test_no_answered_request_is_made_twice_by_runs_that_are_killed(runs, tmp_path, kills):
    kept, count = undisturbed(runs, tmp_path / "whole")
    out = tmp_path / "killed"
    answered: list[str] = []
    received = 0
    for kill in (*kills, None):
        server = run_once(runs, out, len(answered), kill)
        answered += [key(messages) for messages in server.answered]
        received += len(server.received)
    assert len(answered) == len(set(answered)) == count
    assert (out / "kept.jsonl").read_bytes() == kept
    assert received > count  # some were open when it was killed


@pytest.mark.slow
@pytest.mark.parametrize("runs", [20], indirect=True)
def test_no_reply_on_disk_is_asked_for_again_wherever_a_kill_falls(runs, tmp_path):
    """Ten kills at random moments; what was on its way may be asked for again, nothing else."""
    kept, count = undisturbed(runs, tmp_path / "whole")
    out, rng, kills = tmp_path / "killed", random.Random(0), 0
    with StubServer() as server:
        while True:
            known, before = set(on_disk(out)), len(server.received)
            child = runs.start(out, server)
            done = threading.Event()
            if kills < 10:
                # Not before its first request: until then it does nothing. By requests and not by
                # the clock, so that there are some left for the last, however busy the machine is.
                enough = before + 1 + rng.randrange(count // 12)

                def kill(child=child, enough=enough, done=done) -> None:
                    while len(server.received) < enough and not done.is_set():
                        time.sleep(0.001)
                    if not done.wait(rng.uniform(0, 0.02)):
                        os.kill(child, signal.SIGKILL)

                threading.Thread(target=kill, daemon=True).start()
            status = wait(child)
            done.set()
            assert not {key(messages) for messages in server.received[before:]} & known
            if status == 0:
                break
            kills += 1
    assert kills == 10
    assert (out / "kept.jsonl").read_bytes() == kept
    assert len(server.received) <= count + 10 * 8  # 8 at once
