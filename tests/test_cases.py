"""No input of tests/cases fails again."""

import importlib
from pathlib import Path

import pytest
import torch

CASES = sorted(path.stem for path in Path(__file__).with_name("cases").glob("[!_]*.py"))


@pytest.fixture(autouse=True)
def restore_torch_settings():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", CASES)
def test_the_fault_is_gone(name, capsys):
    assert importlib.import_module(f"tests.cases.{name}").fault() is None
