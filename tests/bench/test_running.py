"""Running suites: options, exit codes, progress, and the table."""

import gc
import json
import re
import time
import weakref

import pytest

from bench import layout
from bench.running import suite_main
from bench.suite import Options, Peer, Suite
from bench.table import setup_table
from tests.bench.doubling import Doubling, counted


def test_progress_goes_to_stderr_with_suite_case_and_peer(capsys, ticking_clock):
    right, _ = counted(lambda x: time.sleep(2e-3) or 2 * x)
    suite = Suite("t", Options, lambda o: [Doubling()], [Peer("ours", right)])
    assert suite_main(suite, ["--quick"]) == 0
    out, err = capsys.readouterr()
    assert re.search(r"^t doubling: timing ours, round \d+/\d+$", err, re.M)
    assert all(line.startswith("t doubling: ") for line in err.splitlines())
    assert "timing" not in out and "case doubling" in out


def test_quick_cases_leave_stderr_empty(stopped_clock, capsys):
    right, _ = counted(lambda x: 2 * x)
    suite = Suite("t", Options, lambda o: [Doubling()], [Peer("ours", right)])
    assert suite_main(suite, ["--quick"]) == 0
    assert capsys.readouterr().err == ""


def test_a_setup_is_closed_even_when_a_peer_stops_the_run():
    def stop(_setup):
        raise KeyboardInterrupt

    setup = Doubling()
    with pytest.raises(KeyboardInterrupt):
        suite_main(Suite("t", Options, lambda o: [setup], [Peer("stop", stop)]), ["--quick"])
    assert setup.closed


def test_a_setup_is_gone_before_the_next_one_makes_its_tensors(monkeypatch):
    """Models with recomputed layers refer to themselves."""
    there, found = weakref.WeakSet(), []

    def setups(_options):
        for _ in range(3):
            setup = Doubling()
            setup.itself = setup  # pyright: ignore[reportAttributeAccessIssue]
            yield setup

    def prepare(setup):
        found.append(len(there))
        there.add(setup)
        return counted(lambda x: 2 * x)[0](setup)

    gc.disable()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(gc, "enable", lambda: None)
            suite = Suite("t", Options, setups, [Peer("ours", prepare)])
            assert suite_main(suite, ["--quick"]) == 0
    finally:
        gc.enable()
    assert found == [0, 0, 0]


def test_an_absent_peer_has_no_rows_and_the_environment_says_why(tmp_path, capsys):
    right, _ = counted(lambda x: 2 * x)
    absent = Peer("cuDNN", right, why_absent=lambda device: f"not on {device}")
    suite = Suite("t", Options, lambda o: [Doubling()], [Peer("right", right), absent])
    assert suite_main(suite, ["--quick", "--json", str(tmp_path / "t.json")]) == 0
    record = json.loads((tmp_path / "t.json").read_text())
    assert record["env"]["absent"] == {"cuDNN": "not on cpu"}
    assert [row["peer"] for row in record["rows"]] == ["right"]
    assert suite_main(suite, ["--quick", "--only", "peer=cuDNN"]) == 2
    assert "cuDNN: not on cpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "case"], "--only: 'case' is not of the form KEY=GLOB"),
        (["--only", "colour=red"], "--only: layout has no key 'colour'"),
        (["--only", "case=nothing"], "nothing in layout matches"),
        (["--json", "/no/such/folder/x.json"], "--json: there is no folder"),
        (["--budget", "0"], "--budget is 0"),
        (["--device", "tpu"], "device"),
        (["--device", "cuda"], "--device cuda"),
    ],
)
def test_a_bad_option_exits_2_with_one_line(arguments, message, capsys):
    assert suite_main(layout.SUITE, ["--quick", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_wrong_row_makes_the_command_exit_1(capsys):
    wrong, _ = counted(lambda x: 2 * x + 1)
    suite = Suite("t", Options, lambda o: [Doubling()], [Peer("bad", wrong)])
    assert suite_main(suite, ["--quick"]) == 1
    assert "bad" in capsys.readouterr().err


def test_a_table_shows_only_columns_that_a_row_has():
    columns, versus = {"extra": "extra"}, {"slow": "x slow"}
    suite = Suite("t", Options, lambda o: [], [], columns, versus)
    row = {"peer": "fast", "ours": True, "status": "ok", "peak_bytes": None, "ms": 1.0}
    table = setup_table(suite, {"case": "a"}, [{**row, "iqr_ms": 0.0, "ratios": {"slow": 2.0}}])
    assert [column.header for column in table.columns] == ["peer", "ms", "± IQR", "x slow", "note"]


def test_the_cases_of_earlier_results_are_left_out(tmp_path, capsys):
    class Numbered(Doubling):
        def __init__(self, number):
            self.number = number

        @property
        def key(self):
            return {"case": "doubling", "number": self.number, "density": self.number / 3}

    right, _ = counted(lambda x: 2 * x)
    suite = Suite("t", Options, lambda o: [Numbered(n) for n in range(3)], [Peer("ours", right)])
    first, second, third = (tmp_path / f"{n}.json" for n in range(3))
    assert suite_main(suite, ["--quick", "--only", "number=1", "--json", str(first)]) == 0
    without = ["--without", json.dumps([str(first)])]
    assert suite_main(suite, ["--quick", *without, "--json", str(second)]) == 0
    assert [row["number"] for row in json.loads(second.read_text())["rows"]] == [0, 2]
    # Nothing is left to do, which is no error: it was cut after its last case.
    without = ["--without", json.dumps([str(first), str(second)])]
    assert suite_main(suite, ["--quick", *without, "--json", str(third)]) == 0
    assert not third.exists()
    capsys.readouterr()
    assert suite_main(suite, ["--quick", "--without", json.dumps([str(third)])]) == 2
    assert capsys.readouterr().err.startswith(f"bench.t: --without: {third}: No such file")
