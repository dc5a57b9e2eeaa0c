"""The CUDA trie attention kernels compiled for sm_90a: what the compiler made of them.

Run with `pytest -s` to see the figures.
"""

import re
import subprocess
from pathlib import Path

import pytest

from tests.kernels.cubins import compiled, figures

PASSES = {
    "forward": "trie_attention_fwd",
    "dq": "trie_attention_bwd",
    "dkv": "trie_attention_bwd",
}
PRODUCTS = [f"trie_attention_{name}_{head_dim}" for name in PASSES for head_dim in (64, 128)]
DELTAS = [f"trie_attention_delta_{head_dim}" for head_dim in (64, 128)]


@pytest.fixture(scope="module")
def kernels():
    found = {}
    for source in sorted(set(PASSES.values())):
        found |= figures(compiled(source)[0])
    print()
    for name, row in found.items():
        shown = ("registers", "stack", "HGMMA", "UTMALDG", "UTMASTG", "UBLKCP", "LDL", "STL")
        print(f"{name:28}", *(f"{x} {row.get(x, 0)}" for x in shown))
    return found


def code(kernel: str) -> str:
    triton = pytest.importorskip("triton")
    nvdisasm = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    cubin = compiled(PASSES[kernel.split("_")[2]])[0]
    sass = subprocess.run([nvdisasm, "-c", cubin], check=True, capture_output=True, text=True)
    found = re.search(rf"\.text\.{kernel}:\n(.*?)(?=\n\t?\.section|\Z)", sass.stdout, re.DOTALL)
    assert found
    return found[1]


def test_every_kernel_that_the_host_names_is_there(kernels):
    assert kernels.keys() == {*PRODUCTS, *DELTAS}


def test_no_kernel_uses_local_memory(kernels):
    assert [n for n, k in kernels.items() if k["stack"] or "LDL" in k or "STL" in k] == []


@pytest.mark.parametrize("source", sorted(set(PASSES.values())))
def test_the_compiler_has_no_complaint(source):
    # C75xx: products that wait for one another although the code does not ask for it, or ignored
    # register counts. These are notes, not warnings.
    log = compiled(source)[1]
    assert "warning" not in log.lower() and "C75" not in log
    assert set(re.findall(r"(\d+) bytes spill", log)) == {"0"}


def test_every_product_runs_on_warpgroup_tensor_cores(kernels):
    assert [n for n in PRODUCTS if "HGMMA" not in kernels[n] or "HMMA" in kernels[n]] == []


def test_tiles_come_and_go_by_bulk_copies(kernels):
    bulk = ("UTMALDG.3D", "UTMASTG.3D", "UBLKCP")
    assert [n for n in PRODUCTS if any(name not in kernels[n] for name in bulk)] == []


def test_registers_move_from_the_copying_warps_to_the_computing_ones(kernels):
    assert [n for n in PRODUCTS if kernels[n].get("USETMAXREG") != 2] == []


def test_delta_reads_16_bytes_at_a_time(kernels):
    assert [n for n in DELTAS if kernels[n].get("LDG.E.128") != 2] == []


@pytest.mark.parametrize("kernel", PRODUCTS)
def test_exponentials_run_while_a_product_does(kernel):
    # From where scores are there and one product still runs, to where that is waited for too.
    there = re.split(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x1 ;", code(kernel))[1]
    between = there.partition("WARPGROUP.DEPBAR.LE")[0]
    name, head_dim = kernel.split("_")[2:]
    scores = {"forward": 64, "dq": 64 if head_dim == "64" else 32, "dkv": 32}[name]  # of a thread
    assert between.count("MUFU.EX2") >= scores
