"""bench gpu: an interruption loses no results, and its commands are valid without a GPU."""

import fnmatch
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import attention, decode, gpu, running, steps
from bench.__main__ import main
from bench.environment import REPOSITORY
from bench.gpu import dry_steps, gpu_steps
from bench.steps import Step, StepRunner
from bench.suite import Options, load_suite
from tw_kernels import cuda_build

WAIT = "import time; print('waiting', flush=True); time.sleep(60)"


def python(code):
    return [sys.executable, "-c", code]


def summary(out):
    steps = json.loads((out / "summary.json").read_text())["steps"]
    return {entry["step"]: entry for entry in steps}


def writes(text):
    """A command that takes --json FILE, writes there, and says where."""
    return python(f"import sys; open(sys.argv[2], 'w').write({text!r}); print(sys.argv[2])")


def test_each_step_is_entered_with_its_log_results_status_and_command(tmp_path):
    steps = [
        Step("good", writes("[1]"), 1, writes=True),
        Step("bad", python("print('why'); raise SystemExit(3)"), 1),
        Step("absent", ["no-such-program"], 1, absent="it is not installed"),
        Step("after", python("print('still here')"), 1),
    ]
    assert StepRunner(tmp_path, 100).run(steps) is False
    entries = summary(tmp_path)
    assert [e["status"] for e in entries.values()] == ["ok", "failed", "left out", "ok"]
    assert (tmp_path / "good.json").read_text() == "[1]"
    assert entries["good"]["command"][-2:] == ["--json", str(tmp_path / "good.json")]
    assert entries["bad"]["exit_code"] == 3 and entries["bad"]["log"] == "bad.log"
    assert (tmp_path / "bad.log").read_text() == "why\n"
    assert entries["absent"]["reason"] == "it is not installed"
    assert all(e["seconds"] >= 0 for e in entries.values() if e["status"] != "left out")


def test_a_second_call_goes_on_and_overwrites_nothing(tmp_path):
    good, bad = Step("good", writes("1"), 1, writes=True), Step("bad", python("raise OSError"), 1)
    StepRunner(tmp_path, 100).run([good, bad])
    # What was ok is not run again; what failed is, into files of its own.
    changed = [good._replace(command=writes("2")), bad._replace(command=python("print('now')"))]
    assert StepRunner(tmp_path, 100).run(changed) is True
    assert (tmp_path / "good.json").read_text() == "1"
    assert "OSError" in (tmp_path / "bad.log").read_text()
    assert (tmp_path / "bad-2.log").read_text() == "now\n"
    assert [e["tries"] for e in summary(tmp_path).values()] == [1, 2]
    StepRunner(tmp_path, 100).run(changed, again=["good"])
    assert (tmp_path / "good.json").read_text() == "1"
    assert (tmp_path / "good-2.json").read_text() == "2"


def test_a_step_that_takes_too_long_is_ended_with_all_it_started(tmp_path):
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {WAIT!r}])"
    runner = StepRunner(tmp_path, budget=40)
    start = time.monotonic()
    assert runner.run([Step("slow", python(child), 0.2), Step("next", python("0"), 1)]) is True
    assert time.monotonic() - start < 30
    assert [e["status"] for e in summary(tmp_path).values()] == ["timed out", "ok"]
    assert WAIT not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout


def test_a_step_that_runs_is_named_on_stderr(tmp_path, capsys, monkeypatch, ticking_clock):
    monkeypatch.setattr(steps, "LOOK_SECONDS", 0.02)
    wait = python("import time; time.sleep(0.5)")
    assert StepRunner(tmp_path, 100).run([Step("one", wait, 1), Step("two", wait, 0.5)]) is True
    out, err = capsys.readouterr()
    for name, seconds in (("one", 85), ("two", 42)):
        assert re.search(rf"^{name}: [0-9]+ s, at most {seconds} s$", err, re.M)
    assert "at most" not in out and out.count(" ok ") == 2


def test_without_time_steps_are_left_out_but_the_report_is_written(tmp_path):
    steps = [Step("one", python("0"), 1), Step("report", python("0"), 1, always=True)]
    StepRunner(tmp_path, budget=1).run(steps)
    assert {n: e["status"] for n, e in summary(tmp_path).items()} == {
        "one": "left out",
        "report": "ok",
    }


@pytest.mark.parametrize(("there", "tried"), [(False, ["build"]), (True, ["build", "next"])])
def test_without_the_extension_nothing_else_is_tried(tmp_path, monkeypatch, there, tried):
    """But after a build that fails only at the CUDA kernels, the rest is."""
    monkeypatch.setattr(gpu, "_extension_is_there", lambda: there)
    build = next(step for step in gpu._first() if step.name == "build")
    failing = build._replace(command=python("raise SystemExit(1)"), absent=None)
    assert StepRunner(tmp_path, 100).run([failing, Step("next", python("0"), 1)]) is False
    assert list(summary(tmp_path)) == tried


def test_cuda_kernels_are_built_where_they_can_be(tmp_path, monkeypatch):
    def build() -> Step:
        return next(step for step in gpu._first() if step.name == "build")

    monkeypatch.setattr(cuda_build, "is_wanted", lambda: False)
    assert build().absent == "tw_kernels._C is there"
    monkeypatch.setattr(cuda_build, "is_wanted", lambda: True)
    monkeypatch.setattr(cuda_build, "why_not", lambda: "no nvcc")
    assert build().absent == "tw_kernels._C is there"
    monkeypatch.setattr(cuda_build, "why_not", lambda: None)
    monkeypatch.setattr(cuda_build, "CUBINS", tmp_path)
    assert build().absent is None
    for source in cuda_build.sources():
        (tmp_path / f"{source.stem}.cubin").touch()
    assert build().absent == "all is built"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_loses_nothing_and_exits_130(tmp_path, number):
    # A shell starts background jobs with SIGINT ignored, and whoever they start inherits that.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "import sys, bench.gpu as gpu; from pathlib import Path; steps ="
        f" [gpu.Step('done', {python('0')!r}, 1), gpu.Step('slow', {python(WAIT)!r}, 1)]"
        "; gpu.dry_steps = lambda out: steps; sys.exit(gpu.main(sys.argv[1:]))"
    )
    arguments = ["--out", str(tmp_path), "--budget", "200", "--dry_run"]
    process = subprocess.Popen(
        [*python(code), *arguments], cwd=REPOSITORY, stdout=subprocess.DEVNULL
    )
    log = tmp_path / "slow.log"
    while not (log.exists() and "waiting" in log.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, number)
    assert process.wait(60) == 130
    statuses = {name: entry["status"] for name, entry in summary(tmp_path).items()}
    assert statuses == {"done": "ok", "slow": "interrupted"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "torch sees no CUDA device here; --dry_run"),
        (["--dry_run", "--again", "nothing"], "--again: no step 'nothing'; one of environment"),
        (["--dry_run", "--budget", "0"], "--budget is 0"),
        (["--dry_run"], "summary.json: not a summary"),
    ],
)
def test_what_cannot_be_done_exits_2_with_one_line(tmp_path, capsys, arguments, message):
    (tmp_path / "summary.json").write_text("[]")
    assert main(["gpu", "--out", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_steps_of_a_dry_run_are_those_on_a_gpu():
    real = [step.name for step in gpu_steps(Path("out"))]
    dry = [step.name for step in dry_steps(Path("out"))]
    assert [name for name in real if name in dry] == dry
    assert all(name.startswith("sweep-") for name in set(real) - set(dry))
    # Every one has what it needs to end before the time does.
    assert all(0 < step.share <= 1 for step in gpu_steps(Path("out")))


def test_every_case_that_a_step_on_a_gpu_names_is_there():
    """Nothing else would say so before there is a GPU."""
    names = {
        "attention": [case.name for case in attention.cases(Options(device="cuda"))],
        "decode": [case.name for case in decode.cases(Options(device="cuda"))],
    }
    found = 0
    for step in gpu_steps(Path("out")):
        command = " ".join(step.command)
        for suite, cases in names.items():
            if f"bench.{suite} " in command or f"profile {suite} " in command:
                globs = [a.partition("=")[2] for a in step.command if a.startswith("case=")]
                assert all(fnmatch.filter(cases, glob) for glob in globs), command
                found += len(globs)
    assert found >= 12


def run_here(command: list[str]) -> int:
    """`python -m bench...` in this process, which has everything imported."""
    assert command[:2] == [sys.executable, "-m"]
    module, *arguments = command[2:]
    if module == "bench":
        return main(arguments)
    return running.suite_main(load_suite(module.removeprefix("bench.")), arguments)


def test_every_suite_has_what_a_step_of_a_dry_run_asks_of_it(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(running, "run", lambda suite, *_: asked.append(suite.name) or [])
    for step in dry_steps(tmp_path):
        if step.command[1] == "-m" and step.command[2].startswith("bench."):
            assert step.writes
            assert run_here([*step.command, "--json", str(tmp_path / "new.json")]) == 0
    assert asked == ["attention", "decode", "train_step", "rollout", "attention", "decode"]
    assert "def test_rows_beyond" in (REPOSITORY / gpu.INTERPRETED).read_text()  # of the smoke test


def test_a_dry_run_leaves_what_its_report_is_made_of(tmp_path):
    steps = {step.name: step for step in dry_steps(tmp_path)}
    for name in ("attention", "profile-attention", "profile-decode", "report"):
        results = ["--json", str(tmp_path / f"{name}.json")] if steps[name].writes else []
        assert run_here([*steps[name].command, *results]) == 0
    assert_complete(tmp_path, "attention")


def assert_complete(out: Path, *suites: str) -> None:
    """Rows of ours in the results of each suite, kernels in those of profiles, and a report."""
    for name in suites:
        rows = json.loads((out / f"{name}.json").read_text())["rows"]
        assert any(row["status"] == "ok" and row["ours"] for row in rows), name
    for name in ("attention", "decode"):
        kernels = json.loads((out / f"profile-{name}.json").read_text())["kernels"]
        assert kernels and all(kernel["us"] > 0 for kernel in kernels)
    assert "### attention" in (out / "report.md").read_text()


@pytest.mark.slow
def test_a_dry_run_goes_through_every_step(tmp_path):
    command = [sys.executable, "-m", "bench", "gpu", "--dry_run", "--budget", "900"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], cwd=REPOSITORY, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name, entry in summary(tmp_path).items():
        assert entry["status"] in ("ok", "left out"), (name, entry)
    assert_complete(
        tmp_path, "attention", "decode", "train_step", "rollout", "sweep-star", "sweep-fork"
    )
    assert "passed" in (tmp_path / "smoke.log").read_text()


def test_spilled_registers_are_read_off_compiled_kernels():
    """Off Triton's own cache of launched kernels, whose form is not a public promise."""
    pytest.importorskip("triton")
    code = (
        "import torch; from tests.kernels.compile_for_sm90 import compile_instead_of_launching\n"
        "from tw_kernels.attention.triton import backward_kernels as bwd\n"
        "from bench.profile import triton_spills\n"
        "compiled = compile_instead_of_launching(); q = torch.zeros(64, 2, 64)\n"
        "bwd.row_stats(q, q, torch.zeros(2, 64)); assert triton_spills() == {}\n"
        "compiled[-1].module, compiled[-1].n_spills = object(), 8; print(triton_spills())\n"
    )
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(python(code), cwd=REPOSITORY, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "{'row_stats_kernel': 8}", done.stderr
