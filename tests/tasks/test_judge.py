import logging
import math
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from threadweaver.tasks.judge import Judge


def evaluate(answer: str) -> bool:
    scope = {"math": math, "os": os, "socket": socket, "subprocess": subprocess, "sys": sys}
    return eval(answer, scope)


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
    assert time.monotonic() - start < 20


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


def test_threads_take_turns(judge):
    answers = [f"{i} % 3 == 0" for i in range(60)]
    with ThreadPoolExecutor(8) as threads:
        verdicts = list(threads.map(lambda answer: judge(answer, source=""), answers))
    assert verdicts == [i % 3 == 0 for i in range(60)]


def test_a_grader_that_cannot_be_built_is_an_error():
    with pytest.raises(RuntimeError, match="the grader did not start"):
        Judge(build_nothing)("1", source="")


def test_an_idle_grader_ends_with_its_judge():
    before = set(multiprocessing.active_children())
    judge = Judge(build)
    assert judge("True", source="") is True
    (child,) = set(multiprocessing.active_children()) - before
    del judge
    child.join(5)
    assert child.exitcode == 0


def test_a_grading_without_end_ends_though_the_run_was_killed(tmp_path):
    started = tmp_path / "pid"
    script = tmp_path / "run.py"
    script.write_text(
        "import multiprocessing\n"
        "from tests.tasks.test_judge import build\n"
        "from threadweaver.tasks.judge import Judge\n"
        "if __name__ == '__main__':\n"
        "    judge = Judge(build, seconds=1.0)\n"
        "    judge('True', source='')\n"
        f"    open({str(started)!r}, 'w').write(str(multiprocessing.active_children()[0].pid))\n"
        "    judge('9**9**9 > 0', source='')\n"
    )
    root = Path(__file__).parents[2]
    run = subprocess.Popen(
        [sys.executable, str(script)], env={**os.environ, "PYTHONPATH": str(root)}
    )
    while not started.exists() or not started.read_text():
        assert run.poll() is None
        time.sleep(0.05)
    time.sleep(0.3)
    run.kill()
    run.wait()
    grader = Path(f"/proc/{started.read_text()}")
    deadline = time.monotonic() + 10
    while grader.exists() and "\nState:\tZ" not in (grader / "status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)
