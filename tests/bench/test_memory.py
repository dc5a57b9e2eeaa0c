"""`python -m bench memory`."""

from __future__ import annotations

import pytest

from bench.__main__ import main


@pytest.mark.slow  # seconds
def test_tables_have_a_row_for_each_model(capsys):
    assert main(["memory", "--models", "tiny", "--device_gb", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("| tiny | ")]
    assert len(rows) == 3 and all(row.count("|") == 7 for row in rows)
    assert sum("**" in row for row in rows) == 2  # updates that fit


def test_a_model_without_a_shape_is_one_line(capsys):
    assert main(["memory", "--models", "9B"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "9B" in error


def test_a_gpu_without_memory_is_one_line(capsys):
    for gigabytes in ("0", "-1", "nan"):
        assert main(["memory", "--models", "tiny", "--device_gb", gigabytes]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "device_gb" in error
