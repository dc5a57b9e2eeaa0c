"""A task of one's own, found by the entry point of an installed package."""

import sys
from pathlib import Path

import pytest

from threadweaver.tasks import __main__ as command
from threadweaver.tasks import load_task

SOURCE = """
class Echo:
    ungraded = 0
    def __init__(self, times: int = 1):
        self.times = times
    def problems(self, split, n, seed=0): return []
    def is_correct(self, response, problem): return False
    def demonstration(self, problem, parallel): return None

class Half:
    ungraded = 0
"""


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch):
    """What an installer leaves of a package: its module, and the metadata that names its tasks."""
    (tmp_path / "echo_tasks.py").write_text(SOURCE)
    info = tmp_path / "echo_tasks-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: echo-tasks\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[threadweaver.tasks]\necho = echo_tasks:Echo\nhalf = echo_tasks:Half\n"
        "gone = echo_tasks:Gone\nabsent = absent_module:Task\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "echo_tasks", raising=False)


def test_a_task_of_an_installed_package_loads_by_its_name_with_its_options():
    task = load_task("echo", times=3)
    assert (type(task).__name__, vars(task)) == ("Echo", {"times": 3})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("echo", {"time": 3}, "echo has no option 'time'; it has times"),
        ("half", {}, "half: Half is no task: it lacks problems, is_correct, demonstration"),
        ("gone", {}, "task 'gone': its entry point echo_tasks:Gone cannot be loaded: AttributeErr"),
        ("absent", {}, "its entry point absent_module:Task cannot be loaded: ModuleNotFoundError:"),
        ("ech", {}, "olympiadbench, absent, echo, gone, half and data files"),
        ("ech", {}, "no task 'ech' (did you mean 'echo'?): there are multiplication"),
    ],
)  # fmt: skip
def test_a_broken_entry_point_is_named_in_one_line(name, options, message):
    with pytest.raises(ValueError) as error:
        load_task(name, **options)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_help_lists_the_tasks_of_installed_packages(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tasks", "--help"])
    with pytest.raises(SystemExit, match="0"):
        command.main()
    assert "echo" in capsys.readouterr().out
