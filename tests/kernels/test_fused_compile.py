"""The fused kernels compiled ahead of time: what the compiler made of them.

Run with `pytest -s` to see the table of figures.
"""

import pytest

pytest.importorskip("triton")

from tests.kernels.triton_rows import rows_of

MOST_REGISTERS = 128  # a thread: 512 threads fit a multiprocessor
SHARED_LIMIT = 48 * 1024  # bytes that every block may have unasked


@pytest.mark.parametrize(
    "sm", ["90", *(pytest.param(sm, marks=pytest.mark.slow) for sm in ("80", "86", "89", "100"))]
)
def test_no_fused_kernel_spills_registers(sm):
    rows = rows_of("compile_fused", sm)
    assert len(rows) == 15
    assert [row for row in rows if row["spills"] or row["stack"]] == []
    assert [row for row in rows if row["shared"] > SHARED_LIMIT] == []
    assert [row for row in rows if row["registers"] > MOST_REGISTERS] == []
