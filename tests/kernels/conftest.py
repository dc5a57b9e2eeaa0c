"""Fixtures of the kernels' tests."""

import pytest
import torch

from tw_kernels import _C


@pytest.fixture
def poisoned_outputs(monkeypatch):
    """Whatever the kernels fail to write shows as NaN."""
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)
        monkeypatch.setattr(
            torch, name, lambda *a, make=make, **kw: make(*a, **kw).fill_(torch.nan)
        )


@pytest.fixture(params=_C.cpu_instruction_sets())
def isa(request, monkeypatch):
    """Each instruction set of this machine in turn."""
    monkeypatch.setenv("TW_CPU", request.param)
    return request.param


@pytest.fixture
def threads():
    """Sets how many; undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
