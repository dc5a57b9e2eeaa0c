"""The native decode backend, on every instruction set of this machine, against float64."""

import mmap
import subprocess
import sys

import pytest
import torch

from tests.kernels.decode_batches import (
    Batch,
    Inputs,
    fork_join_batch,
    oracle,
    random_batch,
    random_inputs,
)
from tests.kernels.tries import relative_error
from tw_kernels import PagedKV, backends, trie_decode
from tw_kernels.decode import native as native_decode
from tw_kernels.decode.op import choose_backend

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

# Half-precision outputs carry their rounding, and bfloat16's that of the probabilities too where
# products take pairs; all other arithmetic is float32's.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def run(batch: Batch, inputs: Inputs, variant: dict | None = None, **options) -> torch.Tensor:
    """On fresh copies of the pages. variant: window, softcap, sinks."""
    plan = batch.plan(**options)
    return trie_decode(**inputs.copy().call(), plan=plan, backend="native", **variant or {})


def assert_equals_definition(
    batch: Batch, inputs: Inputs, variant: dict | None = None, **options
) -> None:
    head_dim, dtype = inputs.q.shape[-1], inputs.q.dtype
    got = run(batch, inputs, variant, **options)
    assert got.dtype == dtype and got.is_contiguous()
    want = oracle(batch, inputs, head_dim**-0.5, **variant or {})
    assert relative_error(got, want) <= TOLERANCE[dtype]


@pytest.mark.parametrize("page_size", [1, 8, 16, 20, 64, 256])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_equals_the_definition_for_every_page_size(isa, dtype, page_size):
    batch = random_batch(page_size, sequences=8, page_size=page_size, longest=150, most_new=3)
    assert_equals_definition(batch, random_inputs(batch, (6, 2, 64), dtype))


@pytest.mark.parametrize("head_dim", [1, 8, 20, 33, 40, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_takes_any_head_dim(isa, dtype, head_dim):
    batch = random_batch(2, sequences=6, page_size=16, longest=90, most_new=12)
    assert_equals_definition(batch, random_inputs(batch, (4, 2, head_dim), dtype))


@pytest.mark.parametrize("group", range(1, 18))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_matrix_rows(isa, dtype, group):
    """From dot products over a part of a tile of scores to several tiles."""
    batch = fork_join_batch(prefix=160, suffix=21, prompts=2, threads=3, page_size=16)
    assert_equals_definition(batch, random_inputs(batch, (2 * group, 2, 32), dtype))


@pytest.mark.parametrize("tile_rows", [1, 7, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_long_prefill_is_causal(isa, dtype, tile_rows):
    batch = Batch([list(range(25))], [395], [380], page_size=16, num_pages=25)
    inputs = random_inputs(batch, (3, 1, 32), dtype)
    assert_equals_definition(batch, inputs, tile_rows=tile_rows)


@pytest.mark.parametrize("window", [1, 15, 16, 17, 40, 130])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_window_may_begin_anywhere_in_a_page(isa, dtype, window):
    """Of decoding rows, few and many, and of a prefill in tiles; where keys are read in place, and
    where pages are too odd for it."""
    for page_size in (16, 12):
        decode = fork_join_batch(prefix=160, suffix=21, prompts=2, threads=3, page_size=page_size)
        prefill = Batch(
            [list(range(200 // page_size + 1))], [200], [150], page_size, 200 // page_size + 1
        )
        for batch in (decode, prefill):
            for heads in (1, 9):
                inputs = random_inputs(batch, (heads, 1, 32), dtype)
                assert_equals_definition(batch, inputs, {"window": window}, tile_rows=70)


@pytest.mark.parametrize("softcap", [0.1, 2.0, 50.0, 1e5])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_soft_cap_and_sinks_of_any_size(isa, dtype, softcap):
    batch = random_batch(7, sequences=6, page_size=16, longest=90, most_new=12)
    for heads in (2, 18):
        inputs = random_inputs(batch, (heads, 2, 64), dtype)
        inputs.q *= 4
        sinks = torch.linspace(-20, 20, heads)
        sinks[0] = -torch.inf
        for variant in ({"softcap": softcap}, {"sinks": sinks}):
            assert_equals_definition(batch, inputs, variant)
        assert_equals_definition(batch, inputs, {"softcap": softcap, "sinks": sinks, "window": 30})


@pytest.mark.parametrize("heads", [1, 20])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_values_that_are_not_finite_change_no_bit_of_rows_that_do_not_see_them(isa, dtype, heads):
    batch = Batch([list(range(13))], [200], [150], page_size=16, num_pages=13)
    inputs = random_inputs(batch, (heads, 1, 33), dtype)
    for window, tile_rows in ((None, 64), (37, 64), (37, 150)):
        variant = {"window": window}
        want = run(batch, inputs, variant, tile_rows=tile_rows)
        for value in (torch.nan, torch.inf):
            poisoned = inputs.copy()
            poisoned.new_v = inputs.new_v.clone()
            poisoned.kv.v_pages[2, 15] = value  # position 47, old
            poisoned.new_v[[20, 63], :, 5] = value  # positions 70 and 113
            at = torch.arange(50, 200)[:, None] - torch.tensor([47, 70, 113])
            sees = (at >= 0) & (at < (window or 200))
            got = run(batch, poisoned, variant, tile_rows=tile_rows)
            assert torch.equal(got[~sees.any(1)], want[~sees.any(1)])
            assert not got[sees.any(1)][:, :, 5].isfinite().any()
            only_one = ~sees[:, 0]  # which has all dims
            others = [d for d in range(33) if d != 5]
            assert torch.equal(got[only_one][:, :, others], want[only_one][:, :, others])


UNREADABLE = """
import ctypes, mmap, os
import torch
from tests.kernels.decode_batches import fork_join_batch, oracle, random_inputs
from tests.kernels.tries import relative_error
from tw_kernels import PagedKV, _C, trie_decode

libc = ctypes.CDLL(None)
batch = fork_join_batch(prefix=320, suffix=21, prompts=1, threads=3, page_size=16)
for heads in (1, 6):  # few and many rows
    inputs = random_inputs(batch, (heads, 1, 64), torch.float32)
    for window in (1, 70):
        want = oracle(batch, inputs, 1 / 8, window)
        seen = set()
        for table, length in zip(batch.tables, batch.lengths):
            seen |= set(table[(length - window) // 16 :])
        unseen = set(range(batch.num_pages)) - seen
        assert len(unseen) >= 16
        pools = []
        for pages in (inputs.kv.k_pages, inputs.kv.v_pages):
            pool = torch.frombuffer(mmap.mmap(-1, pages.nbytes), dtype=torch.float32)
            pools.append(pool.view(pages.shape).copy_(pages))
            for page in unseen:  # 4096 bytes, a page of the system
                assert not libc.mprotect(ctypes.c_void_p(pools[-1][page].data_ptr()), 4096, 0)
        new = {"new_k": inputs.new_k, "new_v": inputs.new_v}
        for isa in _C.cpu_instruction_sets():
            for workers in (1, 30):
                os.environ["TW_CPU"] = isa
                plan = batch.plan(num_workers=workers)
                call = inputs.q, PagedKV(*pools), plan, None, "native"
                assert relative_error(trie_decode(*call, window=window, **new), want) <= 1e-5
print("all read what they may")
"""


@pytest.mark.skipif(mmap.PAGESIZE != 4096, reason="pages of keys must be pages of the system")
def test_keys_before_all_windows_are_not_read():
    command = [sys.executable, "-c", UNREADABLE]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "all read what they may\n"), ran.stderr


@pytest.mark.parametrize("most_new", [1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_and_any_number_of_threads_agree_bit_for_bit(isa, threads, dtype, most_new):
    batch = random_batch(5, sequences=40, page_size=16, longest=300, most_new=most_new)
    inputs = random_inputs(batch, (9, 3, 64), dtype)
    plan = batch.plan(num_workers=2)
    # Enough that no phase stays on one thread (kOneThread, kOneThreadBytes of trie_decode.cpp).
    keys_rows = sum(n * (end - first) for _, n, _, first, end, _ in plan.items.tolist())
    assert keys_rows * 9 * 64 > 3e5 and plan.size.slots * 9 * 64 * 4 > 256 << 10
    assert most_new == 1 or 2 * inputs.new_k.nbytes > 256 << 10
    runs = []
    for count in (1, 2, 2, 3):
        threads(count)
        copy = inputs.copy()
        out = trie_decode(**copy.call(), plan=plan, backend="native")
        runs.append([x.nan_to_num(7.0) for x in (out, copy.kv.k_pages, copy.kv.v_pages)])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_new_keys_are_read_in_the_call_that_writes_them(isa):
    """By their own row, by later rows of the sequence and by sequences that share the page."""
    batch = Batch([[0, 1], [0, 2]], [24, 20], [20, 2], page_size=16, num_pages=3)
    inputs = random_inputs(batch, (2, 1, 32), torch.float32)
    assert inputs.kv.k_pages[0, 4:].isnan().all()
    assert_equals_definition(batch, inputs)
    changed = Inputs(inputs.q, inputs.kv, inputs.new_k, inputs.new_v.clone())
    changed.new_v[2] += 1  # position 6: in the page that both read
    before, after = run(batch, inputs), run(batch, changed)
    differs = (before != after).flatten(1).any(1)
    assert differs.tolist() == [False] * 2 + [True] * 20


def test_heads_may_lie_anywhere(isa):
    batch = random_batch(16, sequences=6, page_size=16, longest=60, most_new=2)
    inputs = random_inputs(batch, (4, 2, 32), torch.float32)
    want = run(batch, inputs)
    for shape in ((0, 1), (0, 2)):
        q, new_k, new_v = (
            x.transpose(*shape).contiguous().transpose(*shape)
            for x in (inputs.q, inputs.new_k, inputs.new_v)
        )
        assert not q.is_contiguous()
        assert torch.equal(run(batch, Inputs(q, inputs.kv, new_k, new_v)), want)
    heads_first = [
        x.transpose(1, 2).contiguous().transpose(1, 2)
        for x in (inputs.kv.k_pages, inputs.kv.v_pages)
    ]
    kv = PagedKV(*heads_first)
    plan = batch.plan()
    got = trie_decode(inputs.q, kv, plan, None, "native", new_k=inputs.new_k, new_v=inputs.new_v)
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_result_is_the_same_wherever_keys_lie(isa, dtype):
    """Keys of many rows are read in their pages, or from a copy if pairs would straddle words."""
    batch = fork_join_batch(prefix=160, suffix=21, prompts=2, threads=3, page_size=16)
    inputs = random_inputs(batch, (12, 1, 32), dtype)
    want = run(batch, inputs)
    for first in (0, 1):
        *shape, head_dim = inputs.kv.k_pages.shape
        pages = torch.empty(2, *shape, head_dim + 1, dtype=dtype)[..., first : first + head_dim]
        pages[0], pages[1] = inputs.kv.k_pages, inputs.kv.v_pages
        kv = PagedKV(*pages)
        new_k, new_v = inputs.new_k, inputs.new_v
        got = trie_decode(inputs.q, kv, batch.plan(), None, "native", new_k=new_k, new_v=new_v)
        assert torch.equal(got, want)


NANS = [(torch.float32, bits) for bits in (0x7FC00000, 0x7FC00001, 0x7F800001, -1)]
NANS += [(torch.bfloat16, bits) for bits in (0x7FC0, 0x7FC1, 0x7F81, -1)]


@pytest.mark.parametrize("dtype, bits", NANS)
@pytest.mark.parametrize("heads", [1, 12])
def test_a_nan_reaches_its_row_and_no_other(isa, dtype, bits, heads):
    batch = fork_join_batch(prefix=160, suffix=21, prompts=2, threads=3, page_size=16)
    inputs = random_inputs(batch, (heads, 1, 32), dtype)
    as_int = torch.int32 if dtype == torch.float32 else torch.int16
    inputs.q.view(as_int)[0, 0, 5] = bits
    assert run(batch, inputs).isnan().nonzero()[:, :2].unique(dim=0).tolist() == [[0, 0]]
    assert run(batch, inputs)[0, 0].isnan().all()


def test_rows_of_an_item_may_see_nothing_of_it(isa):
    """They are older than its run, and stand beside rows that see all of it."""
    batch = random_batch(0, 4, 8, 40, 14)
    inputs = random_inputs(batch, (4, 1, 32), torch.float32)
    plan = batch.plan()
    firsts = [(plan.positions[first:end], at) for _, _, at, first, end, _ in plan.items.tolist()]
    assert any((positions < at).any() for positions, at in firsts)
    for tile_rows in (3, 64):
        assert_equals_definition(batch, inputs, tile_rows=tile_rows)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_finite_keys_and_values_never_reach_rows_that_do_not_see_them(isa, dtype):
    """Their scores overflow, too. Rows of both kinds stand in every item."""
    batch = Batch([list(range(13))], [200], [150], page_size=16, num_pages=13)
    inputs = random_inputs(batch, (3, 1, 32), dtype)
    changed = Inputs(inputs.q, inputs.kv, inputs.new_k.clone(), inputs.new_v.clone())
    changed.new_k[120:] = changed.new_v[120:] = torch.finfo(dtype).max
    plan = batch.plan(tile_rows=150, num_workers=1)
    assert (plan.items[:, 3:5] == torch.tensor([0, 150])).all()
    got, want = (run(batch, x, tile_rows=150, num_workers=1)[:120] for x in (changed, inputs))
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conversions_round_like_torch(isa, dtype):
    """A sequence of one token gives its own value: subnormals and overflow included."""
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    new_v = patterns.view(-1, 1, 64).clone()
    new_v[~new_v.isfinite()] = 0
    n = len(new_v)
    batch = Batch([[s] for s in range(n)], [1] * n, [1] * n, page_size=1, num_pages=n)
    pages = torch.full((n, 1, 1, 64), torch.nan, dtype=dtype)
    zeros = torch.zeros(n, 1, 64, dtype=dtype)
    inputs = Inputs(zeros, PagedKV(pages, pages.clone()), zeros, new_v)
    assert torch.equal(run(batch, inputs), new_v)


def test_it_is_what_a_cpu_call_takes():
    assert backends("trie_decode")["native"] is None or torch.cuda.is_available()
    pages = torch.zeros(1, 16, 1, 20)
    for dtype in TOLERANCE:
        kv = PagedKV(pages.to(dtype), pages.to(dtype))
        assert choose_backend(torch.zeros(1, 1, 20, dtype=dtype), kv) == "native"


def test_why_not_names_what_it_cannot_run():
    for wrong in (torch.zeros(1, 1, 16, dtype=torch.float64), torch.zeros(1, 1, 16, device="meta")):
        pages = wrong[None]
        why = native_decode.why_not(wrong, PagedKV(pages, pages)) or ""
        assert ("float64" if wrong.dtype == torch.float64 else "meta") in why


def test_an_unknown_instruction_set_is_named(monkeypatch):
    monkeypatch.setenv("TW_CPU", "avx1024")
    batch = fork_join_batch(16, 1, 1, 1, 16)
    with pytest.raises(ValueError, match="TW_CPU=avx1024: not one of avx512bf16, avx512,"):
        run(batch, random_inputs(batch, (1, 1, 16), torch.float32))
