"""The fused kernels compiled ahead of time: what the compiler made of them.

Run with `pytest -s` to see the table of figures.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
SHARED_LIMIT = 48 * 1024  # bytes that every block may have unasked


@pytest.mark.parametrize(
    "architecture", [90, *(pytest.param(a, marks=pytest.mark.slow) for a in (80, 86, 89, 100))]
)
def test_no_fused_kernel_spills_registers(architecture):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compile_fused", str(architecture)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    print("\n" + done.stdout)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 9
    assert [row for row in rows if row["spills"] or row["stack"]] == []
    assert [row for row in rows if row["shared"] > SHARED_LIMIT] == []
