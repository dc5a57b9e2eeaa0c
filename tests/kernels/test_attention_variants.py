"""Windows, soft caps and sinks of trie_attention, every backend that has them, against float64."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels.rounding import allowed, gradient_terms
from tests.kernels.test_attention import CPU_BACKENDS, LAYOUTS, inputs
from tests.kernels.tries import oracle, random_layout, real_trees, relative_error, visible, within
from tw_kernels import Trie, TrieLayout, trie_attention
from tw_kernels.attention.op import choose_backend

SCALE = 0.3
HAVE_BOTH = ["native", "dense"]
# Windows: the token alone, a few, one tile of native with AVX-512, one more than a tile, and more
# than one block of its softmax.
WINDOWS = [None, 1, 5, 32, 33, 100]


def layouts(*names: str) -> list[TrieLayout]:
    return [LAYOUTS[name]() for name in names]


def head_sinks(heads: int, dtype=torch.float32) -> Tensor:
    return torch.linspace(-2, 3, heads).to(dtype).requires_grad_()


def run(layout: TrieLayout, backend: str, tensors: list[Tensor], **variant: Any) -> list[Tensor]:
    """out, lse, and the gradients of q, k, v and, if there are any, sinks."""
    q, k, v, dout = tensors
    out, lse = trie_attention(q, k, v, layout, SCALE, backend, return_lse=True, **variant)
    with_grad = [q, k, v] if variant.get("sinks") is None else [q, k, v, variant["sinks"]]
    return [out.detach(), lse, *torch.autograd.grad(out, with_grad, dout)]


def run_oracle(layout: TrieLayout, tensors: list[Tensor], window=None, softcap=None, sinks=None):
    q, k, v = (x.detach().double().requires_grad_() for x in tensors[:3])
    sinks = None if sinks is None else sinks.detach().double().requires_grad_()
    mask = within(visible(layout.subtree_ends), window)
    out, lse = oracle(q, k, v, mask, SCALE, softcap, sinks)
    with_grad = [q, k, v] if sinks is None else [q, k, v, sinks]
    return [out.detach(), lse, *torch.autograd.grad(out, with_grad, tensors[3].double())]


def assert_equals_definition(layout, backend, tensors, relative=1e-5, **variant) -> None:
    got, want = run(layout, backend, tensors, **variant), run_oracle(layout, tensors, **variant)
    mask = within(visible(layout.subtree_ends), variant.get("window"))
    terms = gradient_terms(tensors, mask, SCALE, variant.get("softcap"))
    for name, a, b in zip(("out", "lse"), got, want, strict=False):
        assert relative_error(a, b) <= relative, name
    for name, a, b, sizes in zip(("dq", "dk", "dv"), got[2:], want[2:], terms, strict=False):
        # A gradient whose terms all cancel is as exact as they are.
        roundoff = torch.finfo(tensors[0].dtype).eps / 2
        assert (a.double() - b).norm() <= allowed(relative, b, sizes, roundoff), name
    if len(got) == 6:
        assert relative_error(got[5], want[5]) <= relative, "dsinks"
        assert got[5].dtype == variant["sinks"].dtype


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("backend", HAVE_BOTH)
def test_windows_caps_and_sinks_together_equal_the_definition(backend, window, softcap):
    for layout in layouts("one token", "chain", "star", "comb", "forest", "uneven pack"):
        tensors = inputs(layout.num_tokens, torch.float32)
        for sinks in (None, head_sinks(6)):
            assert_equals_definition(
                layout, backend, tensors, window=window, softcap=softcap, sinks=sinks
            )


@pytest.mark.parametrize("backend", HAVE_BOTH)
def test_on_real_trees_of_grouped_heads(backend):
    for number, trie in enumerate(list(real_trees(0.02).values())[::6]):
        layout = trie.layout()
        tensors = inputs(layout.num_tokens, torch.float32, (3, 1), 24)
        variant = {"window": (7, 40, 90)[number % 3], "softcap": 2.0, "sinks": head_sinks(3)}
        assert_equals_definition(layout, backend, tensors, **variant)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_sinks_of_every_backend(backend):
    for layout in layouts("one token", "star", "uneven pack"):
        tensors = inputs(layout.num_tokens, torch.float32)
        assert_equals_definition(layout, backend, tensors, sinks=head_sinks(6))


@pytest.mark.parametrize("window, softcap", [(None, None), (9, None), (9, 2.0)])
def test_float64_is_exact_to_float64(window, softcap):
    layout = random_layout(4)
    tensors = inputs(layout.num_tokens, torch.float64)
    variant = {"window": window, "softcap": softcap, "sinks": head_sinks(6, torch.float64)}
    assert_equals_definition(layout, "dense", tensors, relative=1e-13, **variant)


@pytest.mark.parametrize("dtype, relative", [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("backend", HAVE_BOTH)
def test_half_precision_equals_the_definition(backend, dtype, relative):
    for layout in layouts("comb", "forest"):
        tensors = inputs(layout.num_tokens, dtype, (4, 2), 64)
        variant = {"window": 20, "softcap": 3.0, "sinks": head_sinks(4, dtype)}
        assert_equals_definition(layout, backend, tensors, relative, **variant)


@pytest.mark.parametrize("backend", HAVE_BOTH)
def test_a_window_as_long_as_the_longest_path_is_none_bit_for_bit(backend):
    for layout in layouts("star", "forest"):
        depth = int(visible(layout.subtree_ends).sum(1).max())
        assert layout.longest_path == depth
        tensors = inputs(layout.num_tokens, torch.float32)
        want = run(layout, backend, tensors)
        for window in (depth, depth + 1, 2**40):
            got = run(layout, backend, tensors, window=window)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        shorter = run(layout, backend, tensors, window=depth - 1)
        assert not torch.equal(shorter[0], want[0])


@pytest.mark.parametrize("backend", HAVE_BOTH)
def test_two_runs_agree_bit_for_bit_and_write_every_element(backend, request):
    layout = LAYOUTS["forest"]()
    tensors = inputs(layout.num_tokens, torch.float32)
    variant = {"window": 11, "softcap": 2.0, "sinks": head_sinks(6)}
    want = run(layout, backend, tensors, **variant)
    request.getfixturevalue("poisoned_outputs")
    got = run(layout, backend, tensors, **variant)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("backend", HAVE_BOTH)
def test_what_lies_before_the_window_does_not_leak_by_one_bit(backend, softcap):
    layout = LAYOUTS["chain"]()
    tensors = inputs(layout.num_tokens, torch.float32)
    others = [x.detach().clone() for x in tensors]
    for x in others:
        x[:50] = 3 * torch.randn_like(x[:50])
    others = [x.requires_grad_() for x in others[:3]] + others[3:]
    a, b = (run(layout, backend, t, window=20, softcap=softcap) for t in (tensors, others))
    assert torch.equal(a[0][70:], b[0][70:]) and torch.equal(a[1][:, 70:], b[1][:, 70:])
    assert torch.equal(a[2][70:], b[2][70:])
    for x, y in zip(a[3:], b[3:], strict=True):
        assert torch.equal(x[70:], y[70:])


def test_a_window_that_no_path_exceeds_runs_on_segments():
    layout = LAYOUTS["star"]()
    tensors = inputs(layout.num_tokens, torch.float32)
    want = run(layout, "segments", tensors)
    got = run(layout, "segments", tensors, window=10**6)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_backends_without_a_window_or_a_cap_say_so():
    layout = LAYOUTS["star"]()
    q, k, v, _ = inputs(layout.num_tokens, torch.float32)
    for backend in ("segments", "cuda"):
        cases: list[tuple[dict[str, Any], str]]
        cases = [({"window": 5}, "window"), ({"softcap": 2.0}, "soft cap")]
        for variant, word in cases:
            with pytest.raises(ValueError, match=rf"cannot run on backend '{backend}': .*{word}"):
                trie_attention(q, k, v, layout, backend=backend, **variant)


def test_the_choice_goes_to_a_backend_that_has_them(monkeypatch):
    monkeypatch.setattr("tw_kernels.attention.op.bfloat16_instructions", lambda: ("AMX",))
    large = Trie.from_paths([[0] * 4096 + [t] * 512 for t in range(1, 9)]).layout()
    for dtype, backend in ((torch.bfloat16, "native"), (torch.float64, "dense")):
        q = torch.empty(1, 9, 64, dtype=dtype)
        assert choose_backend(q, q, q, large) == "segments"
        assert choose_backend(q, q, q, large, window=5) == backend
        assert choose_backend(q, q, q, large, softcap=2.0) == backend


@pytest.mark.parametrize(
    "variant, message",
    [
        ({"window": 0}, "window must be an integer of at least 1, or None; got 0"),
        ({"window": -3}, "window must be an integer of at least 1, or None; got -3"),
        ({"window": 4.0}, "window must be an integer of at least 1, or None; got 4.0"),
        ({"sinks": torch.zeros(5)}, r"sinks must be .* here \[6\], on cpu; got"),
        ({"sinks": torch.zeros(6, 1)}, r"here \[6\], on cpu; got torch.float32 \[6, 1\]"),
        ({"sinks": torch.zeros(6).long()}, r"here \[6\], on cpu; got torch.int64 \[6\]"),
        ({"sinks": torch.zeros(6, device="meta")}, "sinks must be .* on cpu; got .* on meta"),
    ],
)
def test_windows_and_sinks_that_do_not_fit_are_refused(variant, message):
    layout = LAYOUTS["star"]()
    q, k, v, _ = inputs(layout.num_tokens, torch.float32)
    with pytest.raises(ValueError, match=message):
        trie_attention(q, k, v, layout, **variant)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_second_derivative_is_an_error(backend):
    layout = random_layout(15)
    q, k, v, dout = inputs(layout.num_tokens, torch.float32)
    sinks = head_sinks(6)
    out = trie_attention(q, k, v, layout, backend=backend, sinks=sinks)
    first = torch.autograd.grad(out, (q, k, v, sinks), dout, create_graph=True)
    for grad in first:
        with pytest.raises(RuntimeError, match="trie_attention is differentiable once"):
            torch.autograd.grad(grad.sum(), q, retain_graph=True)


@pytest.mark.parametrize("backend", HAVE_BOTH)
def test_opcheck_of_all_arguments(backend):
    layout = random_layout(7, roots=2, branches=2, length=10)
    tensors = inputs(layout.num_tokens, torch.float32, dim=16)
    arguments = *tensors[:3], layout.subtree_ends, SCALE, backend, 3, 2.0, head_sinks(6)
    torch.library.opcheck(torch.ops.tw_kernels.trie_attention.default, arguments)


def test_torch_compile_captures_all_arguments_and_agrees():
    def model(q, k, v, sinks, layout):
        return trie_attention(2 * q, k, v, layout, window=4, softcap=2.0, sinks=sinks).sin()

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    sinks = head_sinks(6)
    for seed in (8, 9):
        layout = random_layout(seed)
        q, k, v, dout = inputs(layout.num_tokens, torch.float32)
        outs = [f(q, k, v, sinks, layout) for f in (model, compiled)]
        assert torch.equal(*outs)
        grads = [torch.autograd.grad(out, (q, k, v, sinks), dout) for out in outs]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def cut_layout() -> TrieLayout:
    """Enough work under a window for native to cut its rows into pieces."""
    paths = [[0] * 300 + [t] * 150 for t in range(1, 5)]
    return Trie.from_paths([*paths, [9] * 200]).layout()


def test_rows_cut_into_pieces_sum_to_the_definition_and_skip_what_no_row_sees():
    layout = cut_layout()
    tensors = inputs(layout.num_tokens, torch.float32, (4, 1), 64)
    for window in (100, 350):
        pairs = int(within(visible(layout.subtree_ends), window).sum())
        assert pairs * 4 * 64 > 3 * 8e6  # kPieceWork of trie_attention.cpp
        assert_equals_definition(layout, "native", tensors, window=window, softcap=4.0)


def test_every_instruction_set_has_windows_and_caps(isa):
    for name in ("chain", "bushy forest"):
        layout = LAYOUTS[name]()
        tensors = inputs(layout.num_tokens, torch.float32, (3, 1), 20)
        for window, softcap in ((6, None), (None, 1.0), (40, 50.0)):
            assert_equals_definition(layout, "native", tensors, window=window, softcap=softcap)


def test_threads_do_not_change_a_bit_under_a_window(threads):
    layout = cut_layout()
    tensors = inputs(layout.num_tokens, torch.float32, (4, 1), 64)
    runs = []
    for count in (1, 2, 3):
        threads(count)
        runs.append(run(layout, "native", tensors, window=350, softcap=4.0))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def reached(mask: Tensor, hidden: int, of: str) -> dict[str, Tensor]:
    """Tokens [N] whose results may not be finite if one of token `hidden` is not.

    Rows that see a key or value; a query or dout is a row by itself. Then the gradients of such a
    row's query and of the keys and values that it sees.
    """
    rows = mask[:, hidden].clone()
    if of in ("q", "dout"):
        rows = torch.arange(len(mask)) == hidden
    columns = mask[rows].any(0)
    out = rows if of != "dout" else torch.zeros_like(rows)
    return {"out": out, "dq": rows, "dk": columns, "dv": columns}


@pytest.mark.parametrize("variant", [{}, {"window": 12, "softcap": 2.0}], ids=["plain", "both"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("of", ["q", "k", "v", "dout"])
def test_native_keeps_what_is_not_finite_from_tokens_that_cannot_see_it(isa, of, value, variant):
    paths = [[0] * 15 + [t] * 9 for t in range(1, 4)] + [[4] * 9, [5] * 20 + [6] * 70]
    layout = Trie.from_paths(paths).layout()
    mask = within(visible(layout.subtree_ends), variant.get("window"))
    tensors = [x.detach() for x in inputs(layout.num_tokens, torch.float32, (4, 2), 20)]
    names: list[str] = ["out", "lse", "dq", "dk", "dv"]
    want = dict(zip(names, run(layout, "native", as_leaves(tensors), **variant), strict=True))
    for hidden in (4, 20, 41, 48, 100):
        poisoned = [x.clone() for x in tensors]
        poisoned[("q", "k", "v", "dout").index(of)][hidden, :, 7] = value
        got = dict(zip(names, run(layout, "native", as_leaves(poisoned), **variant), strict=True))
        for name, may in reached(mask, hidden, of).items():
            assert torch.equal(got[name][~may], want[name][~may]), (name, hidden)
        if value != value or of in ("v", "dout"):  # an infinite score may have a finite softmax
            result = "dv" if of == "dout" else "out"
            assert not got[result][reached(mask, hidden, of)[result]].isfinite().all()


def as_leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [x.clone().requires_grad_() for x in tensors[:3]] + tensors[3:]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_what_is_not_finite_stays_in_its_tree_of_a_pack(backend):
    layout = LAYOUTS["uneven pack"]()
    tensors = [x.detach() for x in inputs(layout.num_tokens, torch.float32)]
    want = run(layout, backend, as_leaves(tensors))
    start, end = layout.roots[4]  # two of its length share a bucket of dense
    poisoned = [x.clone() for x in tensors]
    for x in poisoned:
        x[start + 3] = torch.nan
    got = run(layout, backend, as_leaves(poisoned))
    others = np.r_[0:start, end : layout.num_tokens]
    for i in (0, 2, 3, 4):
        assert torch.equal(got[i][others], want[i][others])
        assert got[i][start:end].isnan().any()


def test_what_is_not_finite_stays_on_segments_in_its_node_and_what_sees_it():
    layout = LAYOUTS["star"]()
    tensors = [x.detach() for x in inputs(layout.num_tokens, torch.float32)]
    want = run(layout, "segments", as_leaves(tensors))
    poisoned = [x.clone() for x in tensors]
    for x in poisoned[1:3]:
        x[70] = torch.nan  # of the node [60, 93), a leaf under the root's [0, 60)
    got = run(layout, "segments", as_leaves(poisoned))
    others = np.r_[0:60, 93 : layout.num_tokens]
    for a, b in ((got[0], want[0]), (got[2], want[2])):
        assert torch.equal(a[others], b[others])
        assert a[70].isnan().all()
    for a, b in zip(got[3:], want[3:], strict=True):
        assert torch.equal(a[93:], b[93:])
