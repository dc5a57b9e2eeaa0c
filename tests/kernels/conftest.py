"""Fixtures of the kernels' tests."""

from functools import partial

import pytest
import torch

from tw_kernels import _C


@pytest.fixture
def poisoned_outputs(monkeypatch):
    """Whatever the kernels fail to write shows as NaN. Integers have none and stay as they are."""

    def poisoned(make, *args, **options):
        new = make(*args, **options)
        return new.fill_(torch.nan) if new.is_floating_point() else new

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, partial(poisoned, getattr(torch, name)))


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
