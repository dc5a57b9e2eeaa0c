"""Fixtures of the benchmarks' tests."""

import pytest
import torch

from bench import running

ROOFLINE = {"copy_gb_per_s": 10.0, "matmul_tflops": {"float32": 1.0, "bfloat16": 2.0}}


@pytest.fixture(autouse=True)
def known_roofline(monkeypatch):
    """A fixed roofline: measuring one takes seconds where the CPU has no bfloat16."""
    monkeypatch.setattr(running, "measure_roofline", lambda meter, quick: ROOFLINE)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
