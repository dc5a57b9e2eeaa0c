"""The CUDA kernels compiled for sm_90a: what the compiler made of them.

Run with `pytest -s` to see the figures.
"""

import pytest

from tests.kernels.cubins import compiled, figures
from tw_kernels import cuda_build

SOURCES = [source.stem for source in cuda_build.sources()]
DTYPES = ("bfloat16", "float16")
ATTENTION = [
    f"trie_attention_{name}_{t}_{d}_{grain}"
    for name in ("forward", "dq", "dkv")
    for t in DTYPES
    for d in (64, 128)
    for grain in ("coarse", "fine")
]
DELTAS = [f"trie_attention_delta_{t}_{d}" for t in DTYPES for d in (64, 128)]
ATTENDS = [f"trie_decode_attend_{t}_{d}" for t in DTYPES for d in (64, 128)]
MERGES = [f"trie_decode_merge_{t}_{d}" for t in DTYPES for d in (64, 128)]


@pytest.fixture(scope="module")
def kernels():
    found = {}
    for source in SOURCES:
        found |= figures(compiled(source)[0])
    print()
    for name, row in found.items():
        shown = ("registers", "stack", "HGMMA", "UTMALDG", "UTMASTG", "UBLKCP", "LDL", "STL")
        print(f"{name:40}", *(f"{x} {row.get(x, 0)}" for x in shown))
    return found


def test_every_kernel_that_the_host_names_is_there(kernels):
    assert kernels.keys() == {*ATTENTION, *DELTAS, *ATTENDS, *MERGES, "trie_decode_write"}


def test_no_kernel_uses_local_memory(kernels):
    assert [n for n, k in kernels.items() if k["stack"] or "LDL" in k or "STL" in k] == []


@pytest.mark.parametrize("source", SOURCES)
def test_the_compiler_has_no_complaint(source):
    # C75xx: products that wait for one another although the code does not ask for it, or ignored
    # register counts. These are notes, not warnings.
    log = compiled(source)[1]
    assert "warning" not in log.lower() and "C75" not in log


def test_every_product_runs_on_warpgroup_tensor_cores(kernels):
    products = ATTENTION + ATTENDS
    assert [n for n in products if "HGMMA" not in kernels[n] or "HMMA" in kernels[n]] == []


def test_tiles_come_and_go_by_bulk_copies(kernels):
    bulk = ("UTMALDG.3D", "UTMASTG.3D", "UBLKCP")
    assert [n for n in ATTENTION if any(name not in kernels[n] for name in bulk)] == []
    assert [n for n in ATTENDS if "UTMALDG.4D" not in kernels[n]] == []


def test_registers_move_from_the_copying_warps_to_the_computing_ones(kernels):
    assert [n for n in ATTENTION + ATTENDS if kernels[n].get("USETMAXREG") != 2] == []


def test_decoding_takes_its_queries_by_copies_in_flight_and_its_units_by_a_counter(kernels):
    wanted = ("LDGSTS.E.BYPASS.128", "ATOMG", "STG.E")
    assert [n for n in ATTENDS if any(name not in kernels[n] for name in wanted)] == []


def test_decodings_launches_begin_before_the_last_has_ended(kernels):
    assert [n for n in ("trie_decode_write", *ATTENDS) if "PREEXIT" not in kernels[n]] == []
    assert [n for n in ATTENDS + MERGES if "ACQBULK" not in kernels[n]] == []


def test_rows_are_read_and_written_16_bytes_at_a_time(kernels):
    assert [n for n in DELTAS if kernels[n].get("LDG.E.128") != 2] == []
    write = kernels["trie_decode_write"]
    # One more sets the counter of units.
    assert "LDG.E.128" in write and write["STG"] == write["STG.E.128"] + 1
