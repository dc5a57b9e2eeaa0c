import logging
import math
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from threadweaver.grading.judge import MOST_CHARACTERS, Judge


def evaluate(answer: str) -> bool:
    modules = math, os, signal, socket, subprocess, sys, time
    return eval(answer, {module.__name__: module for module in modules})


def build(grader=evaluate):
    return grader


def build_nothing():
    raise OSError("no such grader")


@pytest.fixture(scope="module")
def judge():
    return Judge(build, seconds=20.0)


@pytest.fixture(scope="module")
def hasty():
    return Judge(build, seconds=1.0)


def assert_ungraded(judge: Judge, answer: str, reason: str, caplog) -> None:
    """One answer is wrong, counted and logged, and the next is graded."""
    before = judge.ungraded
    with caplog.at_level(logging.WARNING):
        assert judge(answer, source="file:7") is False
    assert judge.ungraded == before + 1
    assert f"file:7: grading an answer {reason}" in caplog.text
    assert judge("1 + 1 == 2", source="file:8") is True
    assert judge.ungraded == before + 1


@pytest.mark.parametrize(
    "answer",
    ["all(True for _ in iter(int, 1))", "9**9**9 > 0"],
    ids=["in Python", "in C"],
)
def test_a_grading_without_end_is_ended(hasty, caplog, answer):
    start = time.monotonic()
    assert_ungraded(hasty, answer, "did not end within 1 s", caplog)
    assert time.monotonic() - start < 60


@pytest.mark.parametrize("answer", ["os._exit(0)", "sys.exit()", "os.abort()"])
def test_a_grading_that_ends_its_process_crashed(judge, caplog, answer):
    assert_ungraded(judge, answer, "crashed", caplog)


@pytest.mark.parametrize("answer", ["1 / 0", "no such name", "(", "[0] * 10**10", "False", "0"])
def test_a_grader_that_fails_or_denies_is_wrong(judge, answer):
    before = judge.ungraded
    assert judge(answer, source="") is False
    assert judge.ungraded == before


def test_an_answer_that_is_code_changes_nothing_outside(judge, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("here")
    new = tmp_path / "new"
    for code in (
        f"open({str(new)!r}, 'w')",
        f"open({str(victim)!r}, 'a').write('x')",
        f"os.open({str(new)!r}, os.O_CREAT)",
        f"os.remove({str(victim)!r})",
        f"os.rename({str(victim)!r}, {str(new)!r})",
        f"os.system('touch {new}') or True",
        f"subprocess.run(['touch', {str(new)!r}])",
        f"os.kill({os.getpid()}, 15) or True",
        "os.fork() or True",
        "socket.socket() and True",
    ):
        assert judge(code, source="") is False, code
    assert victim.read_text() == "here" and [f.name for f in tmp_path.iterdir()] == ["victim"]
    assert judge(f"open({str(victim)!r}).read() == 'here'", source="") is True


def test_what_an_answer_returns_never_reaches_the_run(judge, tmp_path):
    trap = tmp_path / "unpickled"
    answer = f"type('Trap', (), {{'__reduce__': lambda self: (open, ({str(trap)!r}, 'w'))}})()"
    assert judge(answer, source="") is True
    assert not trap.exists()


SEEN: list[str] = []


def evaluate_or_count(answer: str) -> bool:
    if answer != "state":
        return evaluate(answer)
    SEEN.append(answer)  # which another answer must not find
    return len(SEEN) == 1


HOSTILE = [
    "True",
    "False",
    "9**9**9 > 0",
    "state",
    "all(True for _ in iter(int, 1))",
    "os._exit(0)",
    "[0] * 10**10",
    "os.abort()",
    "'(' * 10**10 and False",
    "(lambda f: f(f))(lambda f: f(f))",
    "state",
    "1 < 2",
]


@pytest.mark.parametrize("order", [1, -1])
def test_verdicts_depend_neither_on_the_number_of_processes_nor_on_the_order(order):
    found = {}
    for processes in (1, 3):
        judge = Judge(build, evaluate_or_count, seconds=0.3, processes=processes)
        waiting = [judge.submit(a, source="") for a in HOSTILE[::order]]
        found[processes] = [verdict() for verdict in waiting][::order]
        assert judge.ungraded == 4
    assert found[1] == found[3]
    assert [i for i, right in enumerate(found[1]) if right] == [0, 3, 10, 11]


def test_answers_are_graded_side_by_side_and_verdicts_wait_for_who_asks(tmp_path):
    before = children()
    judge = Judge(build, seconds=30.0, processes=4)
    assert judge("True", source="")  # it has started
    (server,) = children() - before
    # None ends before all have begun, and been submitted.
    go = tmp_path / "go"
    waits = f"any(time.sleep(0.05) for _ in iter(lambda: os.path.exists({str(go)!r}), True))"
    waiting = [judge.submit(f"{waits} or {i} == 2", source="") for i in range(4)]
    wait_until(lambda: len(children_of(server)) == 4)
    go.touch()
    assert [verdict() for verdict in reversed(waiting)] == [False, True, False, False]


def test_a_grading_that_sleeps_ends_by_the_clock(caplog):
    judge = Judge(build, seconds=0.1)
    assert_ungraded(judge, "time.sleep(1000)", "did not end within 0.1 s", caplog)


def test_an_answer_that_is_too_long_is_wrong_and_counted(judge, caplog):
    assert_ungraded(judge, "1" * (MOST_CHARACTERS + 1), "of 10,001 characters takes", caplog)
    before = judge.ungraded
    assert judge("1" * 4000, source="") is True and judge.ungraded == before


def test_a_server_that_was_killed_is_replaced(caplog):
    before = children()
    judge = Judge(build, seconds=10.0)
    assert judge("True", source="")
    (server,) = children() - before
    waiting = [judge.submit("time.sleep(1000)", source="file:1") for _ in range(2)]
    os.kill(server, signal.SIGKILL)
    assert [verdict() for verdict in waiting] == [False, False] and judge.ungraded == 2
    assert "file:1: grading an answer crashed" in caplog.text
    assert judge("True", source="") is True
    assert not runs(server)


def test_more_answers_than_the_pipes_hold_are_graded():
    judge = Judge(build, seconds=10.0)
    text = "'" + "x" * 9000 + "' and {} < 0"
    waiting = [judge.submit(text.format(i - 1), source="") for i in range(300)]
    assert sum(verdict() for verdict in waiting) == 1


def test_threads_take_turns(judge):
    answers = [f"{i} % 3 == 0" for i in range(60)]
    with ThreadPoolExecutor(8) as threads:
        verdicts = list(threads.map(lambda answer: judge(answer, source=""), answers))
    assert verdicts == [i % 3 == 0 for i in range(60)]


def test_a_grader_that_cannot_be_built_is_an_error():
    with pytest.raises(RuntimeError, match="the grader did not start"):
        Judge(build_nothing)("1", source="")


def children() -> set[int]:
    """Ids of the processes that this one started and that run."""
    return {pid for pid in children_of(os.getpid()) if runs(pid)}


def children_of(pid: int) -> set[int]:
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):  # the thread has ended in between
            found.update(map(int, (task / "children").read_text().split()))
    return found


def runs(pid: int) -> bool:
    with suppress(OSError):  # it has ended, also in between
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    return False


def wait_until(condition, seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_idle_grader_ends_with_its_judge():
    before = children()
    judge = Judge(build)
    assert judge("True", source="") is True
    (child,) = children() - before
    del judge
    wait_until(lambda: not runs(child))


SCRIPT = """
import sys
from tests.grading.test_judge import build, children
from threadweaver.grading.judge import Judge
print("imported", file=sys.stderr)
judge = Judge(build, seconds=60.0)
assert judge('True', source='') and not judge('False', source='')
print(*children(), flush=True)
{then}
"""


@pytest.mark.parametrize("kind", ["file", "stdin", "module"])
def test_a_plain_script_grades_and_runs_once(tmp_path, kind):
    path = tmp_path / "plain_script.py"
    path.write_text(SCRIPT.format(then=""))
    command = {"file": [str(path)], "stdin": ["-"], "module": ["-m", "plain_script"]}[kind]
    search = os.pathsep.join((str(Path(__file__).parents[2]), str(tmp_path)))
    with path.open() as script:
        done = subprocess.run(
            [sys.executable, *command],
            stdin=script,
            env={**os.environ, "PYTHONPATH": search},
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert (done.returncode, done.stderr) == (0, "imported\n")


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_grading_outlives_a_run_that_is_stopped(sign):
    # Two that never end, in Python and in C; one that sleeps; one that waits for its turn.
    endless = ["all(True for _ in iter(int, 1))", "9**9**9 > 0", "time.sleep(1000)", "True"]
    then = f"waits = [judge.submit(a, source='') for a in {endless}]; print('ready', flush=True)"
    run = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(then=f"{then}; waits[0]()")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert run.stdout is not None
    server = int(run.stdout.readline())
    assert run.stdout.readline() == "ready\n"
    wait_until(lambda: children_of(server))
    graders = children_of(server)
    run.send_signal(sign)
    run.wait(300)
    wait_until(lambda: not any(map(runs, (server, *graders))))
