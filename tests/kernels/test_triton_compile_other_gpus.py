"""The Triton kernels compiled ahead of time for GPUs other than Hopper: their tables fit.

Run with `pytest -s` to see the figures. All architectures: `pytest -m slow`.
"""

import pytest
import torch

pytest.importorskip("triton")

from tests.kernels.triton_rows import rows_of
from tw_kernels.attention.triton import tuning

# Bytes of shared memory that a block can have, by architecture (CUDA programming guide, compute
# capabilities): an A100, a 3090, a 4090, a B200.
SHARED = {"80": 163 * 1024, "86": 99 * 1024, "89": 99 * 1024, "100": 227 * 1024}


def assert_fits(rows: list[dict], sm: str) -> None:
    assert [r for r in rows if r["shared"] > SHARED[sm]] == []
    assert [r for r in rows if r["spills"] or r["stack"]] == []


def test_the_first_configurations_fit_a_3090_without_spills():
    rows = rows_of("compile_for_sm90", "bfloat16", "128", "--sm", "86", "--defaults")
    assert {r["kernel"] for r in rows} == {
        *("row_stats_kernel", "forward_kernel", "dq_kernel", "dkv_kernel")
    }
    assert_fits(rows, "86")


@pytest.mark.slow
@pytest.mark.parametrize("sm", ["80", "86", "89"])
def test_every_configuration_of_attention_fits_without_spills(sm):
    assert_fits(rows_of("compile_for_sm90", "bfloat16", "64", "128", "--sm", sm), sm)


@pytest.mark.slow
def test_hoppers_configurations_of_attention_fit_blackwell():
    # The table is free of spills for sm_90. For sm_100 a window and a soft cap together take a few
    # words more than dK and dV have registers for.
    rows = rows_of("compile_for_sm90", "bfloat16", "64", "128", "--sm", "100")
    assert [r for r in rows if r["shared"] > SHARED["100"]] == []
    assert [r for r in rows if r["stack"] > (0 if r["variant"] == "plain" else 64)] == []


@pytest.mark.slow
@pytest.mark.parametrize("sm", SHARED)
@pytest.mark.parametrize("arguments", [("bfloat16", "256"), ("float32", "64", "128", "256")])
def test_every_configuration_of_large_heads_and_float32_fits(sm, arguments):
    rows = rows_of("compile_for_sm90", *arguments, "--sm", sm)
    assert [r for r in rows if r["shared"] > SHARED[sm]] == []


@pytest.mark.slow
@pytest.mark.parametrize("sm", SHARED)
def test_every_configuration_of_decode_fits(sm):
    rows = rows_of("compile_decode_for_sm90", "bfloat16", "64", "128", "--sm", sm)
    assert [r for r in rows if r["shared"] > SHARED[sm]] == []
    # On sm_86 the narrow kernel keeps one pair of words in local memory, though registers are left;
    # on sm_100 the wide one at head dim 64 has two pairs more than fit.
    assert [r for r in rows if r["stack"] > 16] == []


@pytest.mark.parametrize("variant", [False, True])
@pytest.mark.parametrize(
    ("capability", "warpgroup"),
    [
        *(((8, 0), False), ((8, 6), False), ((8, 7), False), ((8, 9), False)),
        *(((9, 0), True), ((10, 0), True), ((10, 3), True), ((11, 0), True)),
        *(((12, 0), False), ((12, 1), False)),
    ],
)
def test_the_table_follows_the_products_of_a_gpu(capability, warpgroup, variant):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for head_dim in (16, 64, 128, 256):
            found = tuning.candidates_for(capability, dtype, head_dim, variant)
            tables = tuning.WARPGROUP_VARIANTS if variant else tuning.WARPGROUP
            table = tables if warpgroup else tuning.WARP
            assert found == table[dtype.itemsize, max(64, head_dim)]


def test_every_gpu_has_a_configuration_for_every_head_dim_and_dtype():
    keys = {(size, d) for size in (2, 4) for d in (64, 128, 256)}
    for table in (tuning.WARP, tuning.WARPGROUP, tuning.WARPGROUP_VARIANTS):
        assert table.keys() == keys
        assert all(options for candidates in table.values() for options in candidates)
