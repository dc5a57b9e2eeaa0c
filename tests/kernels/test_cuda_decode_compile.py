"""The CUDA decode kernels compiled for sm_90a: what the compiler made of them.

Run with `pytest -s` to see the figures.
"""

import pytest

from tests.kernels import cuda_decode_host
from tests.kernels.cubins import SHARED_LIMIT, compiled, figures

DTYPES = ("bfloat16", "float16")
PARTIALS = [(t, d, w) for t in DTYPES for d in (64, 128) for w in (1, 2)]


@pytest.fixture(scope="module")
def kernels():
    found = figures(compiled("trie_decode")[0])
    print()
    for name, row in found.items():
        shown = ("registers", "stack", "HGMMA", "UTMALDG", "LDL", "STL")
        print(f"{name:40}", *(f"{x} {row.get(x, 0)}" for x in shown))
    return found


@pytest.fixture(scope="module")
def partials(kernels):
    return {key: kernels["trie_decode_partial_{}_{}_{}".format(*key)] for key in PARTIALS}


def test_every_kernel_that_the_host_names_is_there(kernels, partials):
    merges = {f"trie_decode_merge_{t}_{d}" for t in DTYPES for d in (64, 128)}
    assert merges | {"trie_decode_write"} <= kernels.keys()
    assert len(kernels) == len(merges) + 1 + len(partials)


def test_no_kernel_uses_local_memory(kernels):
    assert [n for n, k in kernels.items() if k["stack"] or "LDL" in k or "STL" in k] == []


def test_the_compiler_has_no_complaint():
    # C75xx: products that wait for one another although the code does not ask for it, or ignored
    # register counts. These are notes, not warnings.
    log = compiled("trie_decode")[1]
    assert "warning" not in log.lower() and "C75" not in log


def test_every_product_runs_on_warpgroup_tensor_cores(partials):
    assert [key for key, k in partials.items() if "HGMMA" not in k or "HMMA" in k] == []


def test_pages_arrive_by_bulk_copies_of_tensor_maps(partials):
    assert [key for key, k in partials.items() if "UTMALDG.4D" not in k] == []


def test_new_keys_and_values_move_16_bytes_at_a_time(kernels):
    write = kernels["trie_decode_write"]
    assert "LDG.E.128" in write and write["STG"] == write["STG.E.128"]


def test_as_many_blocks_share_a_multiprocessor_as_the_code_counts_on(partials):
    host = cuda_decode_host.library()
    for (_, head_dim, warpgroups), kernel in partials.items():
        blocks = host.blocks_of_partial(head_dim, warpgroups)
        # The hardware hands out registers to warps by the 256, and takes 1 KiB of each block.
        warps = host.threads_of_partial(warpgroups) // 32
        registers = -(-kernel["registers"] * 32 // 256) * 256 * warps
        shared = host.shared_bytes_of_partial(head_dim, warpgroups)
        assert shared <= SHARED_LIMIT and kernel["shared"] <= 1024
        assert blocks * registers <= 65536
        assert blocks * (shared + 1024) <= 228 * 1024
