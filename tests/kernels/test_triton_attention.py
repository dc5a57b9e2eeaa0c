"""The Triton backend against a float64 oracle, on a GPU or in Triton's interpreter.

Schedules are built here from a dense mask, by definition and in O(N^2): nothing is shared with the
code under test but the format.
"""

import importlib.util
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.kernels.rounding import allowed, gradient_terms
from tests.kernels.tries import oracle, relative_error, visible, within
from tw_kernels import trie_attention, triton_device
from tw_kernels.attention import triton as triton_attention
from tw_kernels.trie import BlockSchedule, TrieLayout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Rows that pad the last block see nothing: 0 / 0 there, never stored.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")

HALF = [torch.bfloat16, torch.float16]


def star(prefix, *threads):
    """A prefix and the threads that follow it, each of a given number of tokens."""
    total = prefix + sum(threads)
    ends = [total] * prefix
    for thread in threads:
        ends += [len(ends) + thread] * thread
    return ends


def random_forest(n, seed, chain=0.7):
    """Each token follows its left neighbour, or with probability 1 - chain any ancestor or none."""
    rng = np.random.default_rng(seed)
    ends, path = [n] * n, []
    for i in range(n):
        keep = len(path) if rng.random() < chain else int(rng.integers(0, len(path) + 1))
        for closed in path[keep:]:
            ends[closed] = i
        path = [*path[:keep], i]
    return ends


def blocks_of(mask, block_q, block_kv):
    """Which pairs of blocks hold a visible pair, and which hold no other; [nq, nkv] each."""
    n = len(mask)
    nq, nkv = -(-n // block_q), -(-n // block_kv)
    touched, full = torch.zeros(2, nq, nkv, dtype=torch.bool)
    for b in range(nq):
        for c in range(nkv):
            pairs = mask[b * block_q :, c * block_kv :][:block_q, :block_kv]
            touched[b, c] = pairs.any()
            full[b, c] = pairs.all() and (c + 1) * block_kv <= n
    return touched, full


def dense_schedule(mask, block_q, block_kv, window=None):
    """The block schedule of any mask whose columns are contiguous."""
    touched, full = blocks_of(within(mask, window), block_q, block_kv)
    nq, nkv = touched.shape
    row_ptr, full_end, kv_blocks, q_range, q_starts = [0], [], [], [], None
    for b in range(nq):
        kv_blocks += full[b].nonzero()[:, 0].tolist()
        full_end.append(len(kv_blocks))
        kv_blocks += (touched[b] & ~full[b]).nonzero()[:, 0].tolist()
        row_ptr.append(len(kv_blocks))
    orders = [
        t.sum(d).argsort(descending=True, stable=True) for t, d in ((touched, 1), (touched, 0))
    ]
    if window is not None:
        starts = within(mask, window).int().argmax(1).split(block_q)
        q_starts = [[int(x.min()), int(x.max())] for x in starts]
        touched, full = blocks_of(mask, block_q, block_kv)  # q_range is what it is without
    for c in range(nkv):
        rows, full_rows = touched[:, c].nonzero()[:, 0], full[:, c].nonzero()[:, 0]
        first, last = int(rows[0]), int(rows[-1]) + 1
        assert len(rows) == last - first
        middle = [int(full_rows[0]), int(full_rows[-1]) + 1] if len(full_rows) else [last, last]
        q_range.append([first, *middle, last])
    int32 = partial(torch.as_tensor, dtype=torch.int32, device=DEVICE)
    fields = map(int32, (row_ptr, full_end, kv_blocks, q_range, *orders))
    return BlockSchedule(*fields, q_starts=None if q_starts is None else int32(q_starts))


class DenseLayout(TrieLayout):
    """A layout whose schedules are those of a dense mask."""

    def __init__(self, ends, mask=None):
        super().__init__(torch.tensor(ends, dtype=torch.int32, device=DEVICE))
        self.mask = visible(self.subtree_ends.cpu()) if mask is None else mask

    def window_starts(self, window):
        return within(self.mask, window).int().argmax(1).to(DEVICE, torch.int32)

    def block_schedule(self, block_q, block_kv, window=None):
        return dense_schedule(self.mask, block_q, block_kv, window)


@dataclass
class Call:
    """Inputs of one forward and backward; padded: beyond its N rows each tensor's memory is NaN."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor

    @classmethod
    def random(cls, n, heads, kv_heads, head_dim, dtype, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def draw(h):
            padded = torch.full((n + 64, h, head_dim), math.nan, dtype=dtype)
            padded[:n] = torch.randn(n, h, head_dim, generator=generator).to(dtype)
            return padded.to(DEVICE)[:n]

        return cls(draw(heads), draw(kv_heads), draw(kv_heads), draw(heads))

    def run(self, layout, window=None, softcap=None):
        """out, lse, dq, dk, dv of the backend."""
        qkv = self.q, self.k, self.v
        assert triton_attention.why_not(*qkv, window, softcap) is None
        scale = self.q.shape[-1] ** -0.5
        plan = triton_attention.plan(layout, self.q, window)
        out, lse = triton_attention.forward(*qkv, plan, scale, softcap)
        grads = triton_attention.backward(self.dout, *qkv, out, lse, plan, scale, softcap)
        return (out, lse, *grads)

    def oracle(self, mask, softcap=None):
        """The same in float64, by the definition, on the CPU."""
        q, k, v = (x.cpu().double().requires_grad_() for x in (self.q, self.k, self.v))
        out, lse = oracle(q, k, v, mask, q.shape[2] ** -0.5, softcap)
        grads = torch.autograd.grad(out, (q, k, v), self.dout.cpu().double())
        return (out.detach(), lse.detach(), *grads)

    def sdpa(self, mask):
        """out, dq, dk, dv of PyTorch's attention under a dense mask, in the inputs' dtype."""
        q, k, v = (x.detach().transpose(0, 1).requires_grad_() for x in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=mask.to(DEVICE), enable_gqa=True
        )[0]
        grads = torch.autograd.grad(out, (q, k, v), self.dout.transpose(0, 1))
        return [x.detach().transpose(0, 1) for x in (out, *grads)]


def assert_exact(call, layout, window=None, softcap=None):
    """The backend agrees with the oracle as float32 can: relative error 1e-5, Frobenius norms."""
    mask = within(layout.mask, window)
    got, want = call.run(layout, window, softcap), call.oracle(mask, softcap)
    for a, b in zip(got[:2], want[:2], strict=True):
        assert relative_error(a.cpu(), b) <= 1e-5
    inputs = call.q, call.k, call.v, call.dout
    terms = gradient_terms(inputs, mask, call.q.shape[2] ** -0.5, softcap)
    for a, b, sizes in zip(got[2:], want[2:], terms, strict=True):
        assert (a.cpu().double() - b).norm() <= allowed(1e-5, b, sizes)


@pytest.fixture
def guarded_outputs(monkeypatch):
    """Whatever torch.empty or empty_like allocates is NaN, and so is memory behind it: an element
    never written is seen in the result, one written beyond the end by the check afterwards.

    Integers, which have no NaN, are allocated as ever: the buffer of triton.testing.do_bench.
    """
    guards, make = [], torch.empty

    def allocate(shape, dtype, device):
        if not dtype.is_floating_point:
            return make(shape, dtype=dtype, device=device)
        count = math.prod(shape)
        memory = torch.full((count + 4096,), math.nan, dtype=dtype, device=device)
        guards.append(memory[count:])
        return memory[:count].view(shape)

    def empty(*shape, dtype, device):
        return allocate(shape, dtype, device)

    def empty_like(x, memory_format):
        assert memory_format == torch.contiguous_format
        return allocate(x.shape, x.dtype, x.device)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        patch.setattr(torch, "empty_like", empty_like)
        yield
    assert guards
    assert all(guard.isnan().all() for guard in guards)


TRIES = {
    "one token": [1],
    "chain": star(65),
    "star": star(33, 20, 30, 14),
    "single-token nodes": star(17, *[1] * 23),
    "roots": [*star(20, 9), *(29 + e for e in star(3, 12, 40))],
    "random": random_forest(83, seed=1),
    "bushy": random_forest(70, seed=2, chain=0.3),
}
HEADS = {"random": (4, 1), "star": (4, 2), "roots": (2, 2)}


@pytest.mark.parametrize("name", TRIES)
def test_float32_agrees_with_the_oracle(name, guarded_outputs):
    ends = TRIES[name]
    call = Call.random(len(ends), *HEADS.get(name, (2, 1)), 16, torch.float32)
    assert_exact(call, DenseLayout(ends))


@pytest.mark.parametrize("head_dim, heads, kv_heads", [(32, 4, 1), (64, 2, 1), (128, 2, 2)])
def test_float32_agrees_with_the_oracle_at_every_head_dim(
    head_dim, heads, kv_heads, guarded_outputs
):
    ends = random_forest(75, seed=head_dim)
    call = Call.random(75, heads, kv_heads, head_dim, torch.float32)
    assert_exact(call, DenseLayout(ends))


# What each is for, in blocks of 16 and 32 as the interpreter has them.
VARIANTS = {
    # dK and dV meet a partial, a full, two partial and then hidden query blocks.
    "window of a chain": (star(165), 70, None),
    # The second thread sees the prefix once more after a block of the first that does not.
    "window of a star": (star(40, 110, 35), 30, None),
    "window of one token": (random_forest(70, seed=8), 1, None),
    "window of a random pack": ([*random_forest(40, 9), *(40 + e for e in star(20, 40))], 9, None),
    "soft cap": (random_forest(75, seed=10), None, 0.7),
    "large soft cap": (star(33, 20, 30), None, 50.0),
    "both": (star(40, 70, 10), 25, 0.7),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_windows_and_soft_caps_agree_with_the_oracle(name, guarded_outputs):
    ends, window, softcap = VARIANTS[name]
    call = Call.random(len(ends), 2, 1, 16, torch.float32)
    assert_exact(call, DenseLayout(ends), window, softcap)


def test_the_op_runs_them_with_sinks_too():
    call = Call.random(60, 2, 1, 16, torch.float32)
    layout = TrieLayout(torch.tensor(random_forest(60, seed=12, chain=0.9), dtype=torch.int32))
    inputs = [*(x.cpu() for x in (call.q, call.k, call.v)), torch.tensor([0.5, -1.0])]
    q, k, v, sinks = (x.double().requires_grad_() for x in inputs)
    mask = within(visible(layout.subtree_ends), 9)
    want, want_lse = oracle(q, k, v, mask, 0.25, 2.0, sinks)
    want_grads = torch.autograd.grad(want, (q, k, v, sinks), call.dout.cpu().double())
    q, k, v, sinks = (x.to(DEVICE).requires_grad_() for x in inputs)
    on_device = TrieLayout(layout.subtree_ends.to(DEVICE))
    got, lse = trie_attention(
        q, k, v, on_device, 0.25, "triton", return_lse=True, window=9, softcap=2.0, sinks=sinks
    )
    grads = torch.autograd.grad(got, (q, k, v, sinks), call.dout)
    for a, b in zip((got, lse, *grads), (want, want_lse, *want_grads), strict=True):
        assert relative_error(a.detach().cpu(), b.detach()) <= 1e-5


@pytest.mark.skipif(DEVICE == "cuda", reason="a compiled kernel keeps its constants")
def test_hidden_runs_longer_than_one_look_are_stepped_over(monkeypatch):
    import triton.language as tl

    from tw_kernels.attention.triton import backward_kernels

    ends, window = star(40, 130, 20), 10
    call = Call.random(len(ends), 1, 1, 16, torch.float32)
    want = call.run(DenseLayout(ends), window)
    monkeypatch.setattr(backward_kernels, "RUN", tl.constexpr(2))
    for got, expected in zip(call.run(DenseLayout(ends), window), want, strict=True):
        assert torch.equal(got, expected)


# No row of a block from 64 on sees below 45, and none of a block from 96 on sees below 77.
@pytest.mark.parametrize(
    "changed, clean", [(slice(16), slice(64, None)), (slice(84, None), slice(32))]
)
def test_not_even_a_nan_gets_beyond_the_blocks_that_a_window_joins(changed, clean):
    window, layout = 20, DenseLayout(star(100))
    before = Call.random(100, 1, 1, 16, torch.float32)
    after = Call(*(x.clone() for x in (before.q, before.k, before.v, before.dout)))
    for x in (after.q, after.k, after.v, after.dout):
        x[changed] = math.nan
    for x, y in zip(before.run(layout, window), after.run(layout, window), strict=True):
        rows = (x.T, y.T) if x.dim() == 2 else (x, y)
        assert not torch.equal(*(r[changed] for r in rows))
        assert torch.equal(*(r[clean] for r in rows))


@pytest.mark.parametrize("large", [1e3, 1e30])
def test_soft_capped_scores_saturate_and_never_overflow(large):
    ends = star(20, 30)
    call = Call.random(len(ends), 2, 1, 16, torch.float32)
    call.q = call.q * large
    assert_exact(call, DenseLayout(ends), softcap=30.0)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_errs_no_more_than_sdpa_under_a_window(dtype, guarded_outputs):
    layout = DenseLayout(random_forest(75, seed=11, chain=0.95))
    call = Call.random(75, 2, 1, 64, dtype)
    mask = within(layout.mask, 12)
    out, _, *grads = call.run(layout, window=12)
    want_out, _, *want_grads = call.oracle(mask)
    for got, theirs, want in zip(
        [out, *grads], call.sdpa(mask), [want_out, *want_grads], strict=True
    ):
        assert relative_error(got.cpu(), want) <= 1.5 * relative_error(theirs.cpu(), want)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    "head_dim, heads, kv_heads", [(16, 4, 1), (32, 2, 1), (64, 2, 2), (128, 2, 1)]
)
def test_half_precision_errs_no_more_than_sdpa(dtype, head_dim, heads, kv_heads, guarded_outputs):
    ends = random_forest(75, seed=3, chain=0.9)
    layout = DenseLayout(ends)
    call = Call.random(75, heads, kv_heads, head_dim, dtype)
    out, lse, *grads = call.run(layout)
    want_out, want_lse, *want_grads = call.oracle(layout.mask)
    assert relative_error(lse.cpu(), want_lse) <= 1e-5
    triples = zip([out, *grads], call.sdpa(layout.mask), [want_out, *want_grads], strict=True)
    for got, theirs, want in triples:
        assert got.dtype == dtype
        assert relative_error(got.cpu(), want) <= 1.5 * relative_error(theirs.cpu(), want)


@pytest.mark.parametrize("n", [31, 32, 33, 63, 64, 97])
def test_rows_beyond_the_last_token_are_neither_read_nor_written(n, guarded_outputs):
    call = Call.random(n, 1, 1, 16, torch.float32)  # NaN behind the inputs, guards behind outputs
    ends = star(n // 2, n - n // 2)
    assert_exact(call, DenseLayout(ends))


def test_the_layouts_own_schedules_give_the_same_bits():
    ends = random_forest(90, seed=5, chain=0.9)
    call = Call.random(90, 1, 1, 16, torch.float32)
    layout = TrieLayout(torch.tensor(ends, dtype=torch.int32, device=DEVICE))
    for variant in ((None, None), (23, 5.0)):
        runs = call.run(layout, *variant), call.run(DenseLayout(ends), *variant)
        for got, expected in zip(*runs, strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_agree_to_the_last_bit(dtype):
    ends = random_forest(80, seed=6)
    call = Call.random(80, 2, 1, 32, dtype)
    layout = DenseLayout(ends)
    for first, second in zip(call.run(layout), call.run(layout), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_thread_changes_no_bit_of_its_siblings(dtype):
    prefix, threads = 21, (18, 25, 16)  # no bound falls on a block's
    layout = DenseLayout(star(prefix, *threads))
    changed = slice(prefix + threads[0], prefix + sum(threads[:2]))
    before = Call.random(prefix + sum(threads), 2, 1, 16, dtype)
    after = Call(*(x.clone() for x in (before.q, before.k, before.v, before.dout)))
    for x, scale in ((after.q, 1e2), (after.k, 1e2), (after.v, 1e4), (after.dout, 1e4)):
        x[changed] = scale * torch.randn_like(x[changed])
    runs = list(zip(before.run(layout), after.run(layout), strict=True))
    runs[1] = runs[1][0].T, runs[1][1].T  # lse: tokens first, like the others
    for x, y in runs:
        assert not torch.equal(x[changed], y[changed])
        assert torch.equal(x[changed.stop :], y[changed.stop :])
        assert torch.equal(x[prefix : changed.start], y[prefix : changed.start])
    for x, y in runs[:3]:  # out, lse, dq; the prefix's dk and dv do gather from every thread
        assert torch.equal(x[:prefix], y[:prefix])


def test_full_blocks_skip_the_mask():
    n = 64 if DEVICE == "cpu" else 128  # a multiple of every block: all pairs can be full
    call = Call.random(n, 2, 1, 16, torch.float32)
    everything = torch.ones(n, n, dtype=torch.bool)
    alone = list(range(1, n + 1))  # no token sees another
    layout = DenseLayout(alone, everything)
    assert_exact(call, layout)


def as_strided_views(call):
    """The same numbers as views: q, k, v of one packed projection, dout of a transposed tensor."""
    heads, kv_heads = call.q.shape[1], call.k.shape[1]
    packed = torch.cat([call.q, call.k, call.v], dim=1)
    q, k, v = packed.split([heads, kv_heads, kv_heads], dim=1)
    return Call(q, k, v, call.dout.transpose(0, 1).contiguous().transpose(0, 1))


def with_strided_rows(call):
    """The same numbers with the elements of a row apart in memory."""
    tensors = (call.q, call.k, call.v, call.dout)
    return Call(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors))


@pytest.mark.parametrize("view", [as_strided_views, with_strided_rows])
def test_strides_do_not_matter(view):
    ends = random_forest(37, seed=7)
    call = Call.random(37, 2, 1, 16, torch.float32)
    layout = DenseLayout(ends)
    for got, expected in zip(view(call).run(layout), call.run(layout), strict=True):
        assert torch.equal(got, expected)


def test_an_expanded_output_gradient():
    call = Call.random(40, 2, 1, 16, torch.float32)
    call.dout = torch.ones((), device=DEVICE).expand(call.q.shape)  # what out.sum() sends back
    ends = star(40)
    assert_exact(call, DenseLayout(ends))


@pytest.mark.parametrize(
    "head_dim, dtype, reason",
    [
        (48, torch.float32, "head dim 48 is not one of 16, 32, 64, 128, 256"),
        (64, torch.float64, "torch.float64 is not one of torch.float32"),
    ],
)
def test_what_it_cannot_run_is_said(head_dim, dtype, reason):
    q = torch.empty(1, 1, head_dim, dtype=dtype, device=DEVICE)
    assert reason in str(triton_attention.why_not(q, q, q))


def test_a_missing_triton_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    triton_device._is_installed.cache_clear()
    q = torch.empty(1, 1, 64, device=DEVICE)
    try:
        assert "triton is not installed" in str(triton_attention.why_not(q, q, q))
    finally:
        triton_device._is_installed.cache_clear()


def test_importing_it_imports_no_triton_and_a_cpu_needs_the_interpreter():
    code = (
        "import sys, torch; from tw_kernels.attention import triton as triton_attention\n"
        "assert 'triton' not in sys.modules\n"
        "q = torch.empty(1, 1, 64); print(triton_attention.why_not(q, q, q))"
    )
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert "TRITON_INTERPRET=1" in done.stdout
