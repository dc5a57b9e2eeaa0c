"""The Triton kernels compiled ahead of time for sm_90: what the compiler made of them.

Run with `pytest -s` to see the table of figures.
"""

import pytest

pytest.importorskip("triton")

from tests.kernels.cubins import SHARED_LIMIT
from tests.kernels.triton_rows import rows_of

KERNELS = {"row_stats_kernel", "forward_kernel", "dq_kernel", "dkv_kernel"}


@pytest.fixture(scope="module")
def rows():
    """One row per kernel, variant and configuration."""
    return rows_of("compile_for_sm90")


def test_every_kernel_is_compiled_at_both_head_dims_with_and_without_window_and_soft_cap(rows):
    assert {(r["kernel"], r["head_dim"], r["variant"]) for r in rows} == {
        (k, d, v) for k in KERNELS for d in (64, 128) for v in ("plain", "window, softcap")
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
