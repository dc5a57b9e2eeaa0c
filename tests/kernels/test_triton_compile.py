"""The Triton kernels compiled ahead of time for sm_90: what the compiler made of them.

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
SHARED_LIMIT = 227 * 1024  # bytes that a block on sm_90 can have
KERNELS = {"row_stats_kernel", "forward_kernel", "dq_kernel", "dkv_kernel"}


@pytest.fixture(scope="module")
def rows():
    """One row per kernel and configuration, bfloat16, head dims 64 and 128."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compile_for_sm90", "bfloat16", "64", "128"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    table = [json.loads(line) for line in done.stdout.splitlines()]
    print("\n" + "  ".join(f"{name:>16}" for name in table[0]))
    for row in table:
        print("  ".join(f"{value!s:>16}" for value in row.values()))
    return table


def test_every_kernel_is_compiled_at_both_head_dims(rows):
    assert {(r["kernel"], r["head_dim"]) for r in rows} == {
        (k, d) for k in KERNELS for d in (64, 128)
    }


def test_no_kernel_spills_registers(rows):
    assert [r for r in rows if r["spills"] or r["stack"]] == []


def test_shared_memory_fits_a_hopper_block(rows):
    assert [r for r in rows if r["shared"] >= SHARED_LIMIT] == []


def test_every_product_runs_on_warpgroup_tensor_cores(rows):
    products = [r for r in rows if r["kernel"] != "row_stats_kernel"]
    assert [r for r in products if not r["HGMMA"] or r["HMMA"]] == []


def test_tiles_arrive_by_wide_asynchronous_copies(rows):
    products = [r for r in rows if r["kernel"] != "row_stats_kernel"]
    assert [r for r in products if not r["async_copies"]] == []
