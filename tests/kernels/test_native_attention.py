"""The native backend, on every instruction set of this machine, against float64."""

import os

import pytest
import torch
from torch import Tensor

from tests.kernels.tries import oracle, random_layout, real_trees, visible
from tw_kernels import _C, Trie, TrieLayout
from tw_kernels.attention import native

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

# Of the largest value; the contract is 1e-5 in float32. In half precision the results are rounded
# to the dtype, and the output that backward reads was, too.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}

LAYOUTS = {
    "one token": lambda: Trie.from_paths([[1]]).layout(),
    "chain": lambda: Trie.from_paths([list(range(130))]).layout(),
    "chain of several softmax blocks": lambda: Trie.from_paths([list(range(300))]).layout(),
    "roots of one token": lambda: Trie.from_paths([[i] for i in range(70)]).layout(),
    "star": lambda: Trie.from_paths([[0] * 60 + [t] * 33 for t in range(1, 6)]).layout(),
    "comb": lambda: Trie.from_paths([[0] * i + [1, 2] for i in range(1, 40)]).layout(),
    "forest": lambda: random_layout(1),
    "bushy forest": lambda: random_layout(2, roots=6, branches=20, length=9),
    "tree of thoughts": lambda: real_trees(0.01)["sorting128ToT-0"].layout(),
}


def big_layout() -> TrieLayout:
    """Enough work for one KV head with 8 query heads of 64 that its rows are cut into pieces."""
    return real_trees(0.02)["sorting128ToT-8"].layout()


def inputs(n: int, dtype=torch.float32, heads=(3, 3), dim=32, seed=0) -> list[Tensor]:
    """q, k, v, dout."""
    generator = torch.Generator().manual_seed(seed)
    counts = (heads[0], heads[1], heads[1], heads[0])
    return [torch.randn(n, h, dim, generator=generator).to(dtype) for h in counts]


def run(layout: TrieLayout, tensors: list[Tensor], scale: float = 0.2) -> list[Tensor]:
    """out, lse, dq, dk, dv."""
    q, k, v, dout = tensors
    assert native.why_not(q, k, v) is None
    plan = native.plan(layout, q)
    out, lse = native.forward(q, k, v, plan, scale)
    return [out, lse, *native.backward(dout, q, k, v, out, lse, plan, scale)]


def assert_equals_definition(layout: TrieLayout, tensors: list[Tensor], scale: float = 0.2) -> None:
    got = run(layout, tensors, scale)
    q, k, v = (x.double().requires_grad_() for x in tensors[:3])
    out, lse = oracle(q, k, v, visible(layout.subtree_ends), scale)
    want = [out.detach(), lse.detach(), *torch.autograd.grad(out, (q, k, v), tensors[3].double())]
    dtype = tensors[0].dtype
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=True):
        assert a.dtype == (torch.float32 if name == "lse" else dtype)
        assert a.shape == b.shape and a.is_contiguous()
        # Gradients that cancel to zero are only as exact as the terms that cancel, of size 1.
        tolerance = TOLERANCE[torch.float32 if name == "lse" else dtype]
        worst = (a.double() - b).abs().max() / b.abs().max().clamp_min(1)
        assert worst < tolerance, f"{name}: {worst:.1e}"


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_equals_the_definition_forward_and_backward(isa, name, dtype):
    layout = LAYOUTS[name]()
    assert_equals_definition(layout, inputs(layout.num_tokens, dtype))


@pytest.mark.parametrize("task", sorted(real_trees(0.01)))
def test_equals_the_definition_on_real_trees(task):
    layout = real_trees(0.01)[task].layout()
    assert_equals_definition(layout, inputs(layout.num_tokens, heads=(2, 1)))


@pytest.mark.parametrize("dim", [1, 16, 40, 48, 64, 80, 128, 256])
def test_takes_any_head_dim(isa, dim):
    layout = random_layout(3, branches=4)
    assert_equals_definition(layout, inputs(layout.num_tokens, heads=(2, 2), dim=dim))
    half = inputs(layout.num_tokens, torch.bfloat16, heads=(2, 2), dim=dim)
    assert_equals_definition(layout, half)


@pytest.mark.parametrize("group", [1, 3, 8])
def test_grouped_heads_share_k_and_v(isa, group):
    layout = random_layout(4)
    assert_equals_definition(layout, inputs(layout.num_tokens, heads=(2 * group, 2)))


def test_heads_cut_into_pieces_sum_to_the_definition(isa):
    layout = big_layout()
    assert layout.visible_pairs * 8 * 64 > 3 * 8e6  # kPieceWork of trie_attention.cpp
    assert_equals_definition(layout, inputs(layout.num_tokens, heads=(8, 1), dim=64))


def test_large_scores_neither_overflow_nor_lose_a_row(isa):
    layout = LAYOUTS["forest"]()
    q, k, v, dout = inputs(layout.num_tokens)
    out, lse, *grads = run(layout, [q * 100, k, v, dout], scale=1.0)
    want, want_lse = oracle(q * 100, k, v, visible(layout.subtree_ends), 1.0)
    assert all(x.isfinite().all() for x in (out, lse, *grads))
    # A score of 1000 is exact to about 1e-4 in float32, and so is an exponential of differences.
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-6, atol=2e-4)
    torch.testing.assert_close(out.double(), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, 0x7F800001, -1], ids=hex)
def test_a_nan_reaches_every_row_that_sees_it(isa, bits):
    layout = Trie.from_paths([[0, 1, 2], [0, 3, 4]]).layout()
    q, k, v, dout = inputs(5)
    k[1] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    out, *_ = run(layout, [q, k, v, dout])
    assert out[1:3].isnan().all()
    assert not out[[0, 3, 4]].isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_round_like_torch(isa, dtype):
    """A root's output is its own v: rounding shows alone, subnormals and overflow included."""
    n = 4096
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    v = patterns.view(n, 1, 16).clone()
    v[~v.isfinite()] = 0
    layout = Trie.from_paths([[i] for i in range(n)]).layout()
    zeros = torch.zeros(n, 1, 16, dtype=dtype)
    out, _ = native.forward(zeros, zeros, v, native.plan(layout, v), 1.0)
    assert torch.equal(out, v)
    # Three equal heads that share one v: dv is 3 dout, which must be rounded.
    wide = torch.randn(n, 1, 16) * torch.logspace(-9, 6, n).view(n, 1, 1)
    dout = wide.clamp(-5e4, 5e4).to(dtype)
    heads = dout.expand(n, 3, 16)
    q = torch.zeros(n, 3, 16, dtype=dtype)
    lse = torch.zeros(3, n)
    *_, dv = native.backward(heads, q, zeros, v, q, lse, native.plan(layout, v), 1.0)
    assert torch.equal(dv, (dout.float() * 3).to(dtype))


def test_two_runs_and_one_or_two_threads_agree_bit_for_bit(isa, threads):
    for layout, heads in [
        (big_layout(), (8, 1)),
        (LAYOUTS["star"](), (3, 3)),
    ]:
        tensors = inputs(layout.num_tokens, heads=heads, dim=64)
        runs = []
        for count in (1, 2, 2, 3):
            threads(count)
            runs.append(run(layout, tensors))
        for other in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_siblings_do_not_leak_by_one_bit(isa):
    prefix, a, b = list(range(20)), list(range(100, 129)), list(range(200, 223))
    layout = Trie.from_paths([prefix + a, prefix + b]).layout()
    tensors = inputs(layout.num_tokens)
    before = run(layout, tensors)
    of_b = slice(len(prefix) + len(a), None)
    changed = [x.clone() for x in tensors]
    for x in changed:
        x[of_b] = x[of_b] * -7 + 3
    after = run(layout, changed)
    kept = slice(0, len(prefix) + len(a))
    own = slice(len(prefix), len(prefix) + len(a))
    assert torch.equal(before[0][kept], after[0][kept])
    assert torch.equal(before[1][:, kept], after[1][:, kept])
    for x, y in zip(before[2:], after[2:], strict=True):
        assert torch.equal(x[own], y[own])
    assert torch.equal(before[2][kept], after[2][kept])


def test_strides_do_not_matter(isa):
    layout = LAYOUTS["forest"]()
    tensors = inputs(layout.num_tokens)
    want = run(layout, tensors)
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in tensors]
    last_strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    padded = [torch.cat([x, x], -1)[..., : x.shape[-1]] for x in tensors]
    for strided in (heads_first, last_strided, padded):
        assert all(torch.equal(a, b) for a, b in zip(want, run(layout, strided), strict=True))
    expanded = [*tensors[:3], torch.ones(()).expand(tensors[3].shape)]
    ones = [*tensors[:3], torch.ones(tensors[3].shape)]
    pairs = zip(run(layout, ones), run(layout, expanded), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_why_not_names_what_it_cannot_run():
    wide = torch.zeros(1, 1, 16, dtype=torch.float64)
    assert "float64" in (native.why_not(wide, wide, wide) or "")
    elsewhere = torch.zeros(1, 1, 16, device="meta")
    assert "meta" in (native.why_not(elsewhere, elsewhere, elsewhere) or "")


def test_an_unknown_instruction_set_is_named(monkeypatch):
    monkeypatch.setenv("TW_CPU", "avx1024")
    layout = LAYOUTS["one token"]()
    with pytest.raises(ValueError, match="TW_CPU=avx1024: not one of avx512bf16, avx512,"):
        run(layout, inputs(1))


def test_the_portable_kernels_are_always_there():
    sets = _C.cpu_instruction_sets()
    assert sets[-1] == "portable"
    assert os.environ.get("TW_CPU", "") in ("", *sets)
