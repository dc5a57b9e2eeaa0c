"""`python -m bench list`, `run` and `profile`."""

import json

import pytest

from bench.__main__ import main
from bench.suite import SUITES, load_suite
from tests.bench.schema import ONCE
from tw_kernels.attention import dense


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_is_known_by_its_name_and_names_each_peer_once(name):
    suite = load_suite(name)
    assert suite.name == name
    peers = [peer.name for peer in suite.peers]
    assert len(set(peers)) == len(peers) and set(suite.versus) <= set(peers)
    assert suite.peers[0].ours and suite.peers[0].why_absent("cpu") is None


def test_list_shows_every_peer_and_why_it_is_absent(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in SUITES:
        for peer in load_suite(name).peers:
            why = peer.why_absent("cpu") or "here"
            assert any(peer.name in line and why in line for line in lines), peer.name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no command: one of list"),
        (["benchmark"], "no command 'benchmark'"),
        (["list", "--device", "tpu"], "--device"),
        (["run"], "suites"),
        (["run", "speed"], "'speed'"),
        (["run", "layout", "--quik"], "did you mean 'quick'?"),
        (["run", "layout", "decode", "--only", "unrolled=1"], "layout matches"),
        (["run", "layout", "decode", "--only", "case=star*"], "decode matches"),
        (["run", "layout", "--quick", "--budget", "-1"], "--budget is -1"),
    ],
)
def test_bad_arguments_exit_2_with_one_line_before_anything_runs(arguments, message, capsys):
    assert main(arguments) == 2
    out, error = capsys.readouterr()
    assert message in error and error.count("\n") == 1 and not out


def test_a_folder_that_cannot_be_made_exits_2_with_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["run", "layout", "--quick", "--json", str(tmp_path / "file" / "results")]) == 2
    error = capsys.readouterr().err
    assert "results" in error and error.count("\n") == 1


def test_run_writes_a_file_for_each_suite_even_when_a_planted_error_makes_a_row_wrong(
    tmp_path, capsys, monkeypatch
):
    forward = dense.forward

    def planted(q, k, v, plan, scale, softcap):
        out, lse = forward(q, k, v, plan, scale, softcap)
        out[-1, -1, 0] += 1  # one number of one head of one row
        return out, lse

    monkeypatch.setattr(dense, "forward", planted)
    only = ["--only", "case=pack*", "peer=ours*", "peer=*trie"]
    arguments = ["run", "layout", "attention", *ONCE, *only, "--json", str(tmp_path / "new")]
    assert main(arguments) == 1
    assert "ours: dense wrong out is off by" in capsys.readouterr().err
    rows = json.loads((tmp_path / "new" / "attention.json").read_text())["rows"]
    assert {row["status"] for row in rows if row["peer"] == "ours: dense"} == {"wrong"}
    wrong = [row for row in rows if row["status"] == "wrong"]
    assert all(row["ms"] is None and "tflops" not in row for row in wrong)
    assert {row["status"] for row in rows if row["peer"] == "ours"} == {"ok"}
    rows = json.loads((tmp_path / "new" / "layout.json").read_text())["rows"]
    assert {row["status"] for row in rows} == {"ok"}


def test_profile_names_on_stderr_what_it_profiles(capsys, monkeypatch):
    monkeypatch.setattr("threadweaver.progress.LINE_SECONDS", 0)
    assert main(["profile", "layout", "--quick", "--only", "case=pack*"]) == 0
    out, err = capsys.readouterr()
    assert "layout pack-8x64: profiling ours: trie\n" in err
    assert all(line.startswith("layout pack-8x64: profiling ours") for line in err.splitlines())
    assert "profiling" not in out


def test_a_filter_that_only_some_suites_know_ends_the_run_before_it_begins(capsys):
    assert main(["run", "layout", "attention", "--quick", "--only", "dtype=float32"]) == 2
    assert "layout has no key 'dtype'" in capsys.readouterr().err


def test_a_file_where_run_wants_a_folder_is_refused(tmp_path, capsys):
    assert main(["run", "layout", "--quick", "--json", str(tmp_path / "layout.json")]) == 2
    assert "python -m bench.layout takes a file" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("suite", "variable"), [("attention", "TW_BACKEND"), ("decode", "TW_DECODE_BACKEND")]
)
def test_a_suite_does_not_run_under_a_name_that_is_not_its_backends(
    suite, variable, monkeypatch, capsys
):
    monkeypatch.setenv(variable, "reference")
    assert main(["run", suite, "--quick"]) == 2
    assert f"unset {variable}" in capsys.readouterr().err
