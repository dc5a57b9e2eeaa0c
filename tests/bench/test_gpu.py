"""bench gpu: an interruption loses no results, and its commands are valid without a GPU."""

import fnmatch
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from bench import attention, decode, gpu, gpu_steps, model_step, running, steps
from bench.__main__ import main
from bench.archive import unpack
from bench.candidate_kernels import CANDIDATES
from bench.compiled import Compiled
from bench.environment import REPOSITORY
from bench.step_profile import step_parser
from bench.steps import Step, StepRunner
from bench.suite import Options, load_suite

cuda_build = gpu_steps.cuda_build
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


def test_a_second_call_repeats_what_had_no_time_to_end_and_overwrites_nothing(tmp_path):
    first = [
        Step("good", writes("1"), 1, writes=True),
        Step("bad", python("raise OSError"), 1),
        Step("slow", python(WAIT), 0.08),
    ]
    assert StepRunner(tmp_path, 100).run(first) is False
    # What failed would fail again, and is not worth the time.
    good, bad, slow = first
    now = python("print('now')")
    changed = [
        good._replace(command=writes("2")),
        bad._replace(command=now),
        slow._replace(command=now, share=1),
    ]
    assert StepRunner(tmp_path, 100).run(changed) is False
    assert "OSError" in (tmp_path / "bad.log").read_text()
    assert (tmp_path / "slow-2.log").read_text() == "now\n"
    assert [e["tries"] for e in summary(tmp_path).values()] == [1, 1, 2]
    assert StepRunner(tmp_path, 100).run(changed, again=["good", "bad"]) is True
    assert (tmp_path / "good.json").read_text() == "1"
    assert (tmp_path / "good-2.json").read_text() == "2"
    assert (tmp_path / "bad-2.log").read_text() == "now\n"


def test_a_build_that_failed_is_tried_again(tmp_path):
    build = Step("build", python("raise OSError"), 1, always=True)
    assert StepRunner(tmp_path, 100).run([build]) is False
    assert StepRunner(tmp_path, 100).run([build._replace(command=python("0"))]) is True


def test_a_suite_that_was_cut_goes_on_after_its_cases(tmp_path):
    show = "import sys; open(sys.argv[2], 'w'); print(sys.argv[3:])"
    cut = Step("suite", python(f"{show}; {WAIT}"), 0.08, writes=True, by_case=True)
    whole = cut._replace(command=python(show), share=1)
    for step in (cut, cut, whole):
        StepRunner(tmp_path, 100).run([step])
    StepRunner(tmp_path, 100).run([whole], again=["suite"])
    logs = [(tmp_path / f"suite{n}.log").read_text() for n in ("", "-2", "-3", "-4")]
    one, two = (str(tmp_path / name) for name in ("suite.json", "suite-2.json"))
    assert "--without" not in logs[0] + logs[3]
    assert logs[1].startswith(str(["--without", json.dumps([one])]))
    assert logs[2].startswith(str(["--without", json.dumps([one, two])]))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems let it run on")
def test_a_step_ends_with_a_runner_that_is_killed(tmp_path):
    code = (
        "import pathlib, sys; from bench.steps import Step, StepRunner; out = sys.argv[1];"
        f" StepRunner(pathlib.Path(out), 200).run([Step('slow', {python(WAIT)!r} + [out], 1)])"
    )
    process = subprocess.Popen(
        [*python(code), str(tmp_path)], cwd=REPOSITORY, stdout=subprocess.DEVNULL
    )
    log = tmp_path / "slow.log"
    while not (log.exists() and "waiting" in log.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    for _ in range(100):
        running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
        if str(tmp_path) not in running:
            return
        time.sleep(0.1)
    pytest.fail("the step runs on")


def test_steps_are_named_where_the_extension_is_not_built(tmp_path):
    """Nor is the package imported, which needs it: `bench gpu` is what builds it."""
    code = (
        "import sys; sys.modules['tw_kernels._C'] = None; import pathlib; from bench import gpu\n"
        "from bench.gpu_steps import dry_steps, gpu_steps; out = pathlib.Path('out')\n"
        "print(len(gpu_steps(out)) > len(dry_steps(out)) > 9, 'tw_kernels' in sys.modules)"
    )
    done = subprocess.run(python(code), cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout == "True False\n", done.stderr


def test_a_step_that_takes_too_long_is_ended_with_all_it_started(tmp_path):
    wait = f"{WAIT}  # {tmp_path}"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {wait!r}])"
    runner = StepRunner(tmp_path, budget=100)
    start = time.monotonic()
    assert runner.run([Step("slow", python(child), 0.08), Step("next", python("0"), 1)]) is True
    assert time.monotonic() - start < 55  # the child waits for 60 s
    assert [e["status"] for e in summary(tmp_path).values()] == ["timed out", "ok"]
    assert wait not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout


def test_a_step_that_runs_is_named_on_stderr(tmp_path, capsys, monkeypatch, ticking_clock):
    monkeypatch.setattr(steps, "LOOK_SECONDS", 0.02)
    wait = python("import time; time.sleep(0.5)")
    assert StepRunner(tmp_path, 100).run([Step("one", wait, 1), Step("two", wait, 0.5)]) is True
    out, err = capsys.readouterr()
    most = {
        name: int(seconds)
        for name, seconds in re.findall(r"^(\w+): \d+ s, at most (\d+) s$", err, re.M)
    }
    assert most.keys() == {"one", "two"} and 0 < most["two"] < most["one"] < 100
    assert "at most" not in out and out.count(" ok ") == 2


def test_without_time_steps_are_left_out_but_the_report_is_written(tmp_path):
    steps = [Step("one", python("0"), 1), Step("report", python("0"), 1, always=True)]
    StepRunner(tmp_path, budget=1).run(steps)
    assert {n: e["status"] for n, e in summary(tmp_path).items()} == {
        "one": "left out",
        "report": "ok",
    }


def test_a_run_that_goes_on_writes_the_report_again_and_builds_what_is_missing(tmp_path):
    report = Step("report", python("print('first')"), 1, always=True)
    build = report._replace(name="build")
    StepRunner(tmp_path, 100).run([build, report])
    again = python("print('second')")
    there = build._replace(command=again, absent="all is built")
    StepRunner(tmp_path, 100).run([there, report._replace(command=again)])
    assert (tmp_path / "report-2.log").read_text() == "second\n"
    assert summary(tmp_path)["build"]["status"] == "ok" and not (tmp_path / "build-2.log").exists()
    StepRunner(tmp_path, 100).run([build._replace(command=again)])
    assert (tmp_path / "build-2.log").read_text() == "second\n"


def test_a_disk_that_is_full_ends_a_run_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "dry_steps", lambda out: [Step("one", python("0"), 1)])

    def full(*_):
        raise OSError(28, "No space left on device", "all.tar.gz")

    monkeypatch.setattr(gpu, "pack", full)
    arguments = ["--out", str(tmp_path / "out"), "--archive", str(tmp_path / "all.tar.gz")]
    assert main(["gpu", "--dry_run", *arguments]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and "No space left on device" in error


@pytest.mark.parametrize(("there", "tried"), [(False, ["build"]), (True, ["build", "next"])])
def test_without_the_extension_nothing_else_is_tried(tmp_path, monkeypatch, there, tried):
    """But after a build that fails only at the CUDA kernels, the rest is."""
    monkeypatch.setattr(gpu_steps, "_extension_is_there", lambda: there)
    build = next(step for step in gpu_steps._first() if step.name == "build")
    failing = build._replace(command=python("raise SystemExit(1)"), absent=None)
    assert StepRunner(tmp_path, 100).run([failing, Step("next", python("0"), 1)]) is False
    assert list(summary(tmp_path)) == tried


def test_cuda_kernels_are_built_where_they_can_be(tmp_path, monkeypatch):
    def build() -> Step:
        return next(step for step in gpu_steps._first() if step.name == "build")

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
    assert build().absent is None  # of which sources is not known
    for source in cuda_build.sources():
        (tmp_path / f"{source.stem}.digest").write_text(cuda_build.cubin_digest(source))
    assert build().absent == "all is built"


def test_a_machine_without_the_extension_builds_it(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_steps, "REPOSITORY", tmp_path)
    assert not gpu_steps._extension_is_there()
    write(tmp_path / "tw_kernels" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}", "")
    assert gpu_steps._extension_is_there()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_loses_nothing_and_exits_130(tmp_path, number):
    # A shell starts background jobs with SIGINT ignored, and whoever they start inherits that.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "import sys, bench.gpu as gpu; from bench.steps import Step; steps ="
        f" [Step('done', {python('0')!r}, 1), Step('slow', {python(WAIT)!r}, 1)]"
        "; gpu.dry_steps = lambda out: steps; sys.exit(gpu.main(sys.argv[1:]))"
    )
    out, archive = tmp_path / "out", tmp_path / "all.tar.gz"
    arguments = ["--out", str(out), "--budget", "200", "--dry_run", "--archive", str(archive)]
    process = subprocess.Popen(
        [*python(code), *arguments], cwd=REPOSITORY, stdout=subprocess.DEVNULL
    )
    log = out / "slow.log"
    while not (log.exists() and "waiting" in log.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, number)
    assert process.wait(300) == 130
    for folder in (out, tmp_path / "unpacked"):
        if folder != out:
            unpack(archive, folder)
        statuses = {name: entry["status"] for name, entry in summary(folder).items()}
        assert statuses == {"done": "ok", "slow": "interrupted"}
        assert "waiting" in (folder / "slow.log").read_text()


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
    real = [step.name for step in gpu_steps.gpu_steps(Path("out"))]
    dry = [step.name for step in gpu_steps.dry_steps(Path("out"))]
    assert [name for name in real if name in dry] == dry
    assert all(name.startswith("sweep-") for name in set(real) - set(dry))
    # Every one has what it needs to end before the time does.
    assert all(0 < step.share <= 1 for step in gpu_steps.gpu_steps(Path("out")))
    # What is told first, and the report last.
    telling = [
        *("tests", "attention-pack", "attention", "decode", "decode-cuda"),
        *("engine", "model_step"),
    ]
    assert [name for name in real if name in telling] == telling == real[3:10]
    assert real[-1] == "report"


def gpu_step(name: str) -> Step:
    return next(step for step in gpu_steps.gpu_steps(Path("out")) if step.name == name)


def test_a_kernel_that_has_never_run_shares_no_step_with_the_others():
    """If it never ends, the rows of the others are written all the same."""
    for name in ("decode", "decode-peers", "decode-window", "sweep-fork", "sweep-tree"):
        globs = [a.partition("=")[2] for a in gpu_step(name).command if a.startswith("peer=")]
        peers = [peer.name for peer in decode.SUITE.peers]
        taken = {peer for glob in globs for peer in fnmatch.filter(peers, glob)}
        assert "ours" in taken and "ours: cuda" not in taken, name
    for name in ("decode-cuda", "profile-decode-cuda", "ncu-decode-cuda"):
        assert "peer=ours: cuda" in gpu_step(name).command
    assert gpu_steps.PACK in gpu_step("attention-pack").command
    assert gpu_steps.PACK not in gpu_step("attention").command


def test_a_candidate_is_timed_on_a_long_path_and_a_pack_in_one_head_dim():
    for candidate in CANDIDATES:
        only = " ".join(gpu_step(f"candidate-{candidate.name}").command)
        assert "case=chain-8192 case=pack-64x512 head_dim=" in only
        assert only.count("case=") == 2 and only.count("head_dim=") == 1
        assert f"head_dim={max(candidate.head_dims)}" in only


def test_all_peers_but_ours_are_those_that_one_glob_names():
    for suite in (attention.SUITE, decode.SUITE):
        others = {peer.name for peer in suite.peers if not peer.ours}
        glob = gpu_steps.OTHERS.partition("=")[2]
        assert others == set(fnmatch.filter([peer.name for peer in suite.peers], glob))


def test_our_backends_for_other_devices_have_no_row_on_a_gpu():
    """Dense attention would hold 151 GB of scores of a trajectory of 34,408 tokens."""
    names = [peer.name for peer in attention.SUITE.peers]
    for step in gpu_steps.gpu_steps(Path("out")):
        if "bench.attention" in step.command:
            globs = [a.partition("=")[2] for a in step.command if a.startswith("peer=")]
            taken = {peer for glob in globs for peer in fnmatch.filter(names, glob)}
            assert not taken & {"ours: dense", "ours: segments", "ours: native"}, step.name


@pytest.mark.parametrize("there", [True, False])
def test_one_test_that_never_ends_takes_no_other_with_it(monkeypatch, there):
    known = {"pytest_timeout": there}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: known.get(name))
    bound = ["--timeout", "60", "--timeout-method", "thread"]
    assert (bound[0] in gpu_steps._tests()) == there
    assert not there or bound == [a for a in gpu_steps._tests() if a in bound]


def test_a_step_of_the_large_model_needs_its_memory(monkeypatch):
    assert model_step.memory_needed("8B") == gpu_steps.STEP_8B_BYTES
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    for gigabytes, absent in ((80, True), (141, False)):
        monkeypatch.setattr(gpu_steps, "_memory", lambda size=gigabytes: size * 10**9)
        assert bool(gpu_step("model_step-8B").absent) == absent
        assert not gpu_step("engine-8B").absent


def test_cuda_kernels_that_cannot_run_have_no_step(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda_build, "CUBINS", tmp_path)
    monkeypatch.setattr(cuda_build, "why_not", lambda: "no nvcc")
    assert gpu_step("decode-cuda").absent == "no nvcc"
    monkeypatch.setattr(cuda_build, "why_not", lambda: None)
    assert gpu_step("decode-cuda").absent is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_steps, "_memory", lambda: 80 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert gpu_step("decode-cuda").absent == "the CUDA kernels are for compute capability 9.0"


def test_every_case_that_a_step_on_a_gpu_names_is_there():
    """Nothing else would say so before there is a GPU."""
    names = {
        "attention": [case.name for case in attention.cases(Options(device="cuda"))],
        "decode": [case.name for case in decode.cases(Options(device="cuda"))],
    }
    names["candidates"] = names["attention"]
    found = 0
    for step in gpu_steps.gpu_steps(Path("out")):
        command = " ".join(step.command)
        for suite, cases in names.items():
            if f"bench.{suite} " in command or f"profile {suite} " in command:
                globs = [a.partition("=")[2] for a in step.command if a.startswith("case=")]
                assert all(fnmatch.filter(cases, glob) for glob in globs), command
                found += len(globs)
    assert found >= 12


# As on a machine that has what a GPU runs and not what training needs besides.
LACKING = (
    "import sys, pytest\n"
    "class Lacking:\n"
    "    def find_spec(self, name, path=None, target=None):\n"
    "        if name.partition('.')[0] in ('datasets', 'jsonargparse'):\n"
    "            raise ModuleNotFoundError(name)\n"
    "sys.meta_path.insert(0, Lacking())\n"
    "sys.exit(pytest.main(['-o', 'addopts=', '-q', '--collect-only', *sys.argv[1:]]))"
)


def gpu_tests(monkeypatch, code: str) -> tuple[dict[str, int], list[str]]:
    """Tests that the step of the GPU tests finds in each file, and its files."""
    monkeypatch.setattr(gpu_steps.os, "cpu_count", lambda: 1)
    command = gpu_steps._tests()
    options = command[command.index("pytest") + 1 :]
    done = subprocess.run([*python(code), *options], cwd=REPOSITORY, capture_output=True, text=True)
    found = re.findall(r"^(tests/[^:\s]+\.py)::", done.stdout, re.M)
    return dict(Counter(found)), [o for o in options if o.startswith("tests/")]


def test_a_package_that_is_not_there_takes_only_the_gpu_tests_that_need_it(monkeypatch):
    found, files = gpu_tests(monkeypatch, LACKING)
    lost = {file for file in files if file not in found}
    assert lost == {"tests/train/test_offload.py", "tests/train/test_optimizer.py"}
    assert sum(found.values()) > 900 and len(files) < 20


@pytest.mark.slow
def test_no_gpu_test_is_in_another_file(monkeypatch):
    everything = LACKING.replace("('datasets', 'jsonargparse')", "()")
    found, files = gpu_tests(monkeypatch, everything)
    assert sorted(found) == files
    monkeypatch.setattr(gpu_steps, "_files_with_gpu_tests", lambda: ["tests/"])
    assert gpu_tests(monkeypatch, everything)[0] == found


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
    for step in gpu_steps.dry_steps(tmp_path):
        is_run = step.command[1] == "-m" and not step.absent
        if is_run and step.command[2].startswith("bench."):
            assert step.writes
            assert run_here([*step.command, "--json", str(tmp_path / "new.json")]) == 0
    assert asked == [
        *("attention", "attention", "decode", "engine", "model_step"),
        *["candidates"] * len(CANDIDATES),
        *("decode", "attention", "attention", "decode", "engine", "model_step"),
        *("train_step", "rollout", "attention", "decode"),
    ]


def test_a_gpu_takes_the_options_of_every_suite_that_its_steps_name():
    """Nothing else would say so before there is a GPU: parsed, and named setups and peers there."""
    parsed = []
    for step in gpu_steps.gpu_steps(Path("out")):
        command = [word for word in step.command if word not in gpu_steps.NCU]
        if "bench.report" in command or "-m" not in command or not step.writes:
            continue
        module, *arguments = command[command.index("-m") + 1 :]
        if arguments[0] == "step":
            assert step_parser().parse_args(arguments[1:]).device == "cuda"
            continue
        name = arguments.pop(1) if module == "bench" else module.removeprefix("bench.")
        arguments = arguments[1:] if module == "bench" else arguments
        suite = load_suite(name)
        options = suite.options(**vars(suite.parser(name).parse_args(arguments)))
        assert options.device == "cuda"
        peers = [text.partition("=")[2] for text in options.only if text.startswith("peer=")]
        names = [peer.name for peer in suite.peers]
        optional = "FlashAttention*"  # of packages
        assert all(fnmatch.filter(names, glob) for glob in peers if glob != optional), command
        parsed.append(step.name)
    assert len(parsed) >= 19


def test_a_run_goes_on_from_an_archive(tmp_path, monkeypatch, capsys):
    first, second, archive = tmp_path / "first", tmp_path / "second", tmp_path / "all.tar.gz"
    monkeypatch.setattr(gpu, "dry_steps", lambda out: [Step("one", python("print('1')"), 1)])
    assert main(["gpu", "--dry_run", "--out", str(first), "--archive", str(archive)]) == 0
    steps = [Step("one", python("1 / 0"), 1), Step("two", python("print('2')"), 1)]
    monkeypatch.setattr(gpu, "dry_steps", lambda out: steps)
    assert main(["gpu", "--dry_run", "--out", str(second), "--archive", str(archive)]) == 0
    assert {n: e["status"] for n, e in summary(second).items()} == {"one": "ok", "two": "ok"}
    assert (second / "one.log").read_text() == "1\n"
    unpack(archive, tmp_path / "third")
    assert (tmp_path / "third" / "two.log").read_text() == "2\n"
    capsys.readouterr()
    archive.write_bytes(b"no archive")
    assert main(["gpu", "--dry_run", "--out", str(tmp_path / "4"), "--archive", str(archive)]) == 2
    inside = str(second / "all.tar.gz")
    assert main(["gpu", "--dry_run", "--out", str(second), "--archive", inside]) == 2
    nowhere = str(tmp_path / "no" / "c.tar.gz")
    assert main(["gpu", "--dry_run", "--out", str(second), "--cache", nowhere]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert ["--archive" in errors[0], "is in --out" in errors[1], "no folder" in errors[2]] == [
        *[True] * 3
    ]


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_what_one_run_compiled_is_there_in_the_next(tmp_path):
    """In another folder, as on another machine: Triton's groups of files hold absolute paths."""
    file, before, after = tmp_path / "c.tar.gz", tmp_path / "before", tmp_path / "after"
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    for root in (before, after):
        write(root / "csrc" / "cuda" / "decode" / "trie_decode.cu", "source")
    one = Compiled(file, before)
    one.restore()
    kernel = Path(one.env["TRITON_CACHE_DIR"]) / "KEY"
    for name in ("k.cubin", "k.json", "k.ptx", "k.llir"):
        write(kernel / name, name)
    paths = {name: str(kernel / name) for name in ("k.cubin", "k.json", "k.ptx")}
    write(kernel / "__grp__k.json", json.dumps({"child_paths": paths}))
    write(Path(one.env["TORCHINDUCTOR_CACHE_DIR"]) / "fxgraph" / "g", "graph")
    write(before / "tw_kernels" / f"_C{suffix}", "extension")
    write(before / "tw_kernels" / "cubins" / "trie_decode.cubin", "cubin")
    write(before / "tw_kernels" / "cubins" / "trie_decode.digest", "digest")
    one.save(built=True)
    two = Compiled(file, after)
    two.restore()
    there = Path(two.env["TRITON_CACHE_DIR"]) / "KEY"
    assert {p.name for p in there.iterdir()} == {"k.cubin", "k.json", "__grp__k.json"}
    group = json.loads((there / "__grp__k.json").read_text())["child_paths"]
    assert group["k.cubin"] == str(there / "k.cubin") and after in there.parents
    assert (Path(two.env["TORCHINDUCTOR_CACHE_DIR"]) / "fxgraph" / "g").read_text() == "graph"
    assert (after / "tw_kernels" / f"_C{suffix}").read_text() == "extension"
    assert (after / "tw_kernels" / "cubins" / "trie_decode.cubin").read_text() == "cubin"
    assert (after / "tw_kernels" / "cubins" / "trie_decode.digest").read_text() == "digest"


@pytest.mark.parametrize("why", ["other sources", "not built by the run"])
def test_an_extension_of_other_sources_or_of_unknown_ones_is_not_taken(tmp_path, why):
    file, before, after = tmp_path / "c.tar.gz", tmp_path / "before", tmp_path / "after"
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    write(before / "csrc" / "a.cpp", "one")
    write(after / "csrc" / "a.cpp", "two" if why == "other sources" else "one")
    write(before / "tw_kernels" / f"_C{suffix}", "extension")
    one = Compiled(file, before)
    one.restore()
    one.save(built=why == "other sources")
    Compiled(file, after).restore()
    assert not (after / "tw_kernels" / f"_C{suffix}").exists()


def test_a_cache_is_written_only_when_more_was_compiled(tmp_path):
    compiled = Compiled(tmp_path / "c.tar.gz", tmp_path)
    compiled.restore()
    compiled.save(built=False)
    compiled.file.unlink()
    compiled.save(built=False)
    assert not compiled.file.exists()
    write(Path(compiled.env["TRITON_CACHE_DIR"]) / "KEY" / "k.cubin", "x")
    compiled.save(built=False)
    assert compiled.file.exists()


def test_steps_run_in_the_environment_of_the_cache(tmp_path):
    show = Step("show", python("import os; print(os.environ['TRITON_CACHE_DIR'])"), 1)
    entered = []
    StepRunner(tmp_path, 100, {"TRITON_CACHE_DIR": "/there"}, entered.append).run([show])
    assert (tmp_path / "show.log").read_text() == "/there\n" and len(entered) == 1


def test_a_dry_run_leaves_what_its_report_is_made_of(tmp_path):
    steps = {step.name: step for step in gpu_steps.dry_steps(tmp_path)}
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
    command = [sys.executable, "-m", "bench", "gpu", "--dry_run", "--budget", "1800"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], cwd=REPOSITORY, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name, entry in summary(tmp_path).items():
        assert entry["status"] in ("ok", "left out"), (name, entry)
    steps = gpu_steps.dry_steps(tmp_path)
    written = [step.name for step in steps if step.writes and not step.absent]
    assert_complete(tmp_path, *(name for name in written if not name.startswith("profile-")))
    assert "skipped" in (tmp_path / "tests.log").read_text()


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
