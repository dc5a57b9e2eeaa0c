"""Fixtures of the benchmarks' tests."""

import pytest

from bench import frame

ROOFLINE = {"copy_gb_per_s": 10.0, "matmul_tflops": {"float32": 1.0, "bfloat16": 2.0}}


@pytest.fixture(autouse=True)
def known_roofline(monkeypatch):
    """Measuring it takes seconds where the CPU has no bfloat16; only tests of it need it."""
    monkeypatch.setattr(frame, "measure_roofline", lambda meter, quick: ROOFLINE)
