"""The decode kernels compiled ahead of time for sm_90: what the compiler made of them.

Run with `pytest -s` to see the table of figures.
"""

import pytest

pytest.importorskip("triton")

from tests.kernels.cubins import SHARED_LIMIT
from tests.kernels.triton_rows import rows_of

KERNELS = {"write_kernel", "partial_kernel", "merge_kernel"}


@pytest.fixture(scope="module")
def rows():
    """One row per kernel, page size, variant and configuration."""
    return rows_of("compile_decode_for_sm90")


@pytest.fixture
def products(rows):
    return [r for r in rows if r["kernel"] == "partial_kernel"]


def test_every_kernel_is_compiled_at_both_head_dims_and_page_sizes(rows):
    calls = [(16, "plain"), (64, "plain"), (16, "window, softcap, sinks")]
    assert {(r["kernel"], r["head_dim"], r["page_size"], r["variant"]) for r in rows} == {
        (k, d, *call) for k in KERNELS for d in (64, 128) for call in calls
    }


def test_no_kernel_spills_registers(rows):
    assert [r for r in rows if r["spills"] or r["stack"]] == []


def test_two_blocks_of_up_to_64_rows_share_a_multiprocessor(rows, products):
    assert [r for r in rows if r["shared"] >= SHARED_LIMIT] == []
    # While one waits for its pages the other multiplies: shared memory and registers for both.
    products = [r for r in products if r["config"][0] <= 64]
    assert [r for r in products if 2 * (r["shared"] + 1024) > 228 * 1024] == []
    assert [r for r in products if 2 * r["registers"] * 32 * r["config"][2] > 65536] == []


def test_wide_items_run_on_warpgroup_tensor_cores_and_narrow_ones_on_warp_tensor_cores(products):
    assert {r["config"][0] for r in products} == {16, 64, 128}
    for r in products:
        wide = r["config"][0] >= 64
        assert (r["HGMMA"] > 0, r["HMMA"] > 0) == (wide, not wide), r


def test_pages_arrive_by_wide_asynchronous_copies(products):
    assert [r for r in products if not r["async_copies"]] == []
