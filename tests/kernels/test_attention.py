"""trie_attention, every backend that can run here, against its definition in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.rounding import TENSOR_CORES, allowed, gradient_terms
from tests.kernels.tries import (
    oracle,
    random_layout,
    real_trees,
    relative_error,
    visible,
)
from tw_kernels import Trie, TrieLayout, backends, trie_attention
from tw_kernels.attention import segments
from tw_kernels.attention.op import TRIE_ATTENTION, choose_backend

CPU_BACKENDS = [n for n in TRIE_ATTENTION if n not in ("triton", "cuda", "flash")]
Grads = tuple[Tensor, ...]


def inputs(n: int, dtype: torch.dtype, heads=(6, 2), dim=32, seed=0, device="cpu") -> list[Tensor]:
    """q, k, v that require gradients, and dout."""
    generator = torch.Generator().manual_seed(seed)
    counts = (heads[0], heads[1], heads[1], heads[0])
    made = [torch.randn(n, h, dim, generator=generator).to(device, dtype) for h in counts]
    return [x.requires_grad_() for x in made[:3]] + made[3:]


def run(layout: TrieLayout, backend: str, tensors: list[Tensor], scale=None):
    q, k, v, dout = tensors
    out, lse = trie_attention(q, k, v, layout, scale, backend=backend, return_lse=True)
    return out, lse, torch.autograd.grad(out, (q, k, v), dout)


def run_oracle(layout: TrieLayout, tensors: list[Tensor], scale: float):
    q, k, v = (x.detach().double().requires_grad_() for x in tensors[:3])
    out, lse = oracle(q, k, v, visible(layout.subtree_ends), scale)
    return out, lse, torch.autograd.grad(out, (q, k, v), tensors[3].double())


def run_sdpa(layout: TrieLayout, tensors: list[Tensor], scale: float) -> tuple[Tensor, Grads]:
    """Plain SDPA with the dense mask, in the inputs' dtype."""
    q, k, v, dout = tensors
    mask = visible(layout.subtree_ends)
    heads_first = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, scale=scale, enable_gqa=True)
    out = out.squeeze(0).transpose(0, 1)
    return out, torch.autograd.grad(out, (q, k, v), dout)


def usable(backend: str, tensors: list[Tensor]) -> None:
    if reason := TRIE_ATTENTION[backend].why_not(*tensors[:3]):
        pytest.skip(f"{backend}: {reason}")


LAYOUTS = {
    "one token": lambda: Trie.from_paths([[1]]).layout(),
    "chain": lambda: Trie.from_paths([list(range(130))]).layout(),
    "roots of one token": lambda: Trie.from_paths([[i] for i in range(40)]).layout(),
    "star": lambda: Trie.from_paths([[0] * 60 + [t] * 33 for t in range(1, 6)]).layout(),
    "comb": lambda: Trie.from_paths([[0] * i + [1, 2] for i in range(1, 40)]).layout(),
    "forest": lambda: random_layout(1),
    "bushy forest": lambda: random_layout(2, roots=6, branches=20, length=9),
    "uneven pack": lambda: Trie.pack(
        [Trie.from_paths([list(range(n))]) for n in (1, 100, 3, 64, 65, 2)]
    ).layout(),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_float32_equals_the_definition_forward_and_backward(backend, name):
    layout = LAYOUTS[name]()
    tensors = inputs(layout.num_tokens, torch.float32)
    usable(backend, tensors)
    out, lse, grads = run(layout, backend, tensors, scale=0.3)
    want_out, want_lse, want_grads = run_oracle(layout, tensors, scale=0.3)
    assert relative_error(out, want_out) <= 1e-5
    assert relative_error(lse, want_lse) <= 1e-5
    terms = gradient_terms(tensors, visible(layout.subtree_ends), 0.3)
    for got, want, sizes in zip(grads, want_grads, terms, strict=True):
        assert (got.double() - want).norm() <= allowed(1e-5, want, sizes)


@pytest.mark.parametrize("heads, dim", [((1, 1), 16), ((4, 4), 64), ((8, 1), 128), ((9, 3), 256)])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_float32_for_grouped_heads_and_head_dims(backend, heads, dim):
    layout = random_layout(3)
    tensors = inputs(layout.num_tokens, torch.float32, heads, dim)
    usable(backend, tensors)
    out, _, grads = run(layout, backend, tensors)
    want_out, _, want_grads = run_oracle(layout, tensors, dim**-0.5)
    assert relative_error(out, want_out) <= 1e-5
    for got, want in zip(grads, want_grads, strict=True):
        assert relative_error(got, want) <= 1e-5


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_float32_on_real_trees(backend):
    for name, trie in list(real_trees(scale=0.05).items())[::6]:
        layout = trie.layout()
        tensors = inputs(layout.num_tokens, torch.float32, (3, 1), 32)
        usable(backend, tensors)
        out, _, grads = run(layout, backend, tensors)
        want_out, _, want_grads = run_oracle(layout, tensors, 32**-0.5)
        assert relative_error(out, want_out) <= 1e-5, name
        for got, want in zip(grads, want_grads, strict=True):
            assert relative_error(got, want) <= 1e-5, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["star", "comb", "forest", "bushy forest", "uneven pack"])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_half_precision_errs_at_most_half_more_than_sdpa(backend, name, dtype):
    layout = LAYOUTS[name]()
    tensors = inputs(layout.num_tokens, dtype, (4, 2), 64)
    usable(backend, tensors)
    out, _, grads = run(layout, backend, tensors)
    want_out, _, want_grads = run_oracle(layout, tensors, 0.125)
    sdpa_out, sdpa_grads = run_sdpa(layout, tensors, 0.125)
    assert relative_error(out, want_out) <= 1.5 * relative_error(sdpa_out, want_out)
    for got, sdpa, want in zip(grads, sdpa_grads, want_grads, strict=True):
        assert relative_error(got, want) <= 1.5 * relative_error(sdpa, want)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("backend", TRIE_ATTENTION)
def test_gpu_equals_the_definition(backend, name, dtype):
    layout = TrieLayout(LAYOUTS[name]().subtree_ends.cuda())
    tensors = inputs(layout.num_tokens, dtype, (8, 2), 64, device="cuda")
    usable(backend, tensors)
    out, lse, grads = run(layout, backend, tensors)
    want_out, want_lse, want_grads = run_oracle(layout, tensors, 0.125)
    sdpa_out, sdpa_grads = run_sdpa(layout, tensors, 0.125)
    exact = dtype == torch.float32
    relative = 1e-5 if exact else 1.5 * relative_error(sdpa_out, want_out)
    assert relative_error(out, want_out) <= relative
    assert relative_error(lse, want_lse) <= 1e-3
    terms = gradient_terms(tensors, visible(layout.subtree_ends), 0.125)
    for got, sdpa, want, sizes in zip(grads, sdpa_grads, want_grads, terms, strict=True):
        error = (got.double() - want).norm()
        if exact:
            assert error <= allowed(1e-5, want, sizes)
        else:
            # Ours rounds dS to half precision; SDPA under a mask may keep it in float32.
            of_rounding = torch.finfo(dtype).eps / 2 * want.norm()
            usual = 1.5 * (sdpa.double() - want).norm() + of_rounding
            assert error <= max(usual, allowed(0, want, sizes, TENSOR_CORES))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_float64_is_exact_to_float64(backend):
    layout = random_layout(4)
    tensors = inputs(layout.num_tokens, torch.float64)
    usable(backend, tensors)
    out, lse, grads = run(layout, backend, tensors)
    want_out, want_lse, want_grads = run_oracle(layout, tensors, 32**-0.5)
    assert relative_error(out, want_out) <= 1e-13
    assert relative_error(lse, want_lse) <= 1e-13
    for got, want in zip(grads, want_grads, strict=True):
        assert relative_error(got, want) <= 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_two_backward_passes_are_bitwise_equal(backend, dtype):
    layout = random_layout(5)
    tensors = inputs(layout.num_tokens, dtype)
    usable(backend, tensors)
    first, second = run(layout, backend, tensors), run(layout, backend, tensors)
    assert torch.equal(first[0], second[0])
    for a, b in zip(first[2], second[2], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_nothing_leaks_between_siblings_by_one_bit(backend, dtype):
    prefix, threads = 37, [21, 45, 30]
    paths = [[0] * prefix + [t + 1] * n for t, n in enumerate(threads)]
    layout = Trie.from_paths(paths).layout()
    tensors = inputs(layout.num_tokens, dtype)
    usable(backend, tensors)
    changed = slice(prefix + threads[0], prefix + threads[0] + threads[1])
    others = [x.detach().clone() for x in tensors]
    for x in others:
        x[changed] = 3.0 * torch.randn_like(x[changed])
    others = [x.requires_grad_() for x in others[:3]] + others[3:]
    (out, _, grads), (out2, _, grads2) = (run(layout, backend, t) for t in (tensors, others))
    sibling_rows = [slice(prefix, prefix + threads[0]), slice(changed.stop, None)]
    assert torch.equal(out[:prefix], out2[:prefix])
    for rows in sibling_rows:
        assert torch.equal(out[rows], out2[rows])
        for a, b in zip(grads, grads2, strict=True):
            assert torch.equal(a[rows], b[rows])


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_every_output_element_is_written(backend, request):
    layout = LAYOUTS["uneven pack"]()
    tensors = inputs(layout.num_tokens, torch.float32)
    usable(backend, tensors)
    want = run(layout, backend, tensors)
    request.getfixturevalue("poisoned_outputs")
    got = run(layout, backend, tensors)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert all(torch.equal(a, b) for a, b in zip(got[2], want[2], strict=True))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_strided_inputs_give_the_same_bits(backend):
    layout = random_layout(6)
    tensors = inputs(layout.num_tokens, torch.float32)
    usable(backend, tensors)
    want = run(layout, backend, tensors)
    heads_first = [x.detach().transpose(0, 1).contiguous().transpose(0, 1) for x in tensors]
    strided = [x.requires_grad_() for x in heads_first[:3]] + heads_first[3:]
    got = run(layout, backend, strided)
    assert relative_error(got[0], want[0].double()) <= 1e-6
    for a, b in zip(got[2], want[2], strict=True):
        assert relative_error(a, b.double()) <= 1e-6


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_opcheck(backend):
    layout = random_layout(7, roots=2, branches=2, length=10)
    tensors = inputs(layout.num_tokens, torch.float32, dim=16)
    usable(backend, tensors)
    arguments = (*tensors[:3], layout.subtree_ends, 0.25, backend)
    torch.library.opcheck(torch.ops.tw_kernels.trie_attention.default, arguments)


@pytest.mark.parametrize(
    "compiler",
    # Inductor compiles C++ for half a minute.
    ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)],
)
def test_torch_compile_captures_the_whole_graph_and_agrees(compiler):
    def model(q, k, v, layout):
        return trie_attention(2 * q, k, v, layout).sin()

    compiled = torch.compile(model, backend=compiler, fullgraph=True, dynamic=True)
    for seed in (8, 9):
        layout = random_layout(seed)
        q, k, v, dout = inputs(layout.num_tokens, torch.float32)
        want, got = model(q, k, v, layout), compiled(q, k, v, layout)
        assert relative_error(got, want.double()) <= 1e-6
        for a, b in zip(
            torch.autograd.grad(got, (q, k, v), dout),
            torch.autograd.grad(want, (q, k, v), dout),
            strict=True,
        ):
            assert relative_error(a, b.double()) <= 1e-6


def test_lse_carries_no_gradient():
    layout = random_layout(10)
    q, k, v, _ = inputs(layout.num_tokens, torch.float32)
    _, lse = trie_attention(q, k, v, layout, return_lse=True)
    assert lse.dtype == torch.float32 and lse.shape == (6, layout.num_tokens)
    assert not lse.requires_grad


def test_a_layout_dropped_before_backward_is_rebuilt():
    trie = Trie.from_paths([[0] * 20 + [t] * 9 for t in range(1, 4)])
    q, k, v, dout = inputs(len(trie), torch.float32)
    out = trie_attention(q, k, v, trie.layout(), backend="segments")
    want = run(trie.layout(), "segments", [q, k, v, dout])
    for a, b in zip(torch.autograd.grad(out, (q, k, v), dout), want[2], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("instructions", "large_bfloat16"),
    [((), "native"), (("AVX512_BF16",), "native"), (("AMX", "AVX512_BF16"), "segments")],
)
def test_cpu_rule_takes_native_but_for_float64_and_with_amx_large_bfloat16_tries(
    monkeypatch, instructions, large_bfloat16
):
    monkeypatch.setattr("tw_kernels.attention.op.bfloat16_instructions", lambda: instructions)
    tiny = Trie.from_paths([[t] * 8 for t in range(64)]).layout()
    large = Trie.from_paths([[0] * 4096 + [t] * 512 for t in range(1, 9)]).layout()
    for layout, dtype, backend in (
        (tiny, torch.float32, "native"),
        (large, torch.float32, "native"),
        (tiny, torch.bfloat16, "native"),
        (large, torch.bfloat16, large_bfloat16),
        (large, torch.float16, "native"),
        (tiny, torch.float64, "segments"),
    ):
        q = torch.empty(1, 9, 64, dtype=dtype)
        assert choose_backend(q, q, q, layout) == backend


def test_named_backend_and_environment_override_the_rule(monkeypatch):
    layout = random_layout(11)
    q, k, v, _ = inputs(layout.num_tokens, torch.float32)
    called = []
    original = segments.forward
    monkeypatch.setattr(segments, "forward", lambda *a: called.append(1) or original(*a))
    monkeypatch.setenv("TW_BACKEND", "segments")
    trie_attention(q, k, v, layout)
    assert len(called) == 1
    trie_attention(q, k, v, layout, backend="dense")
    assert len(called) == 1


def test_unusable_choices_say_why(monkeypatch):
    layout = random_layout(12)
    q, k, v, _ = inputs(layout.num_tokens, torch.float32)
    with pytest.raises(ValueError, match="no backend 'cutlass' for trie_attention: "):
        trie_attention(q, k, v, layout, backend="cutlass")
    monkeypatch.setenv("TW_BACKEND", "fast")
    with pytest.raises(ValueError, match="no backend 'fast'"):
        trie_attention(q, k, v, layout)
    with pytest.raises(ValueError, match=r"cannot run on backend 'dense': .*int64"):
        trie_attention(q.long(), k.long(), v.long(), layout, backend="dense")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda q, k, v: (q[0], k, v), r"q must be \[N, Hq, D\]"),
        (lambda q, k, v: (q, k, v[:, :1]), r"q must be \[N, Hq, D\]"),
        (lambda q, k, v: (q[:, :5], k, v), "Hq be a multiple of Hkv"),
        (lambda q, k, v: (q[:, :0], k, v), "at least one token, head and head dim are needed"),
        (lambda q, k, v: (q, k[:, :0], v[:, :0]), "at least one token, head and head dim are"),
        (lambda q, k, v: (q[..., :0], k[..., :0], v[..., :0]), "at least one token, head and"),
        (lambda q, k, v: (q[:0], k[:0], v[:0]), "at least one token, head and head dim are"),
        (lambda q, k, v: (q[..., :16], k, v), "N and D must agree"),
        (lambda q, k, v: (q[:-1], k[:-1], v[:-1]), "the trie has"),
        (lambda q, k, v: (q, k.bfloat16(), v), "must share a dtype"),
        (lambda q, k, v: (q.to("meta"), k, v), "must share a device"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, message):
    layout = random_layout(13)
    q, k, v, _ = inputs(layout.num_tokens, torch.float32)
    with pytest.raises(ValueError, match=message):
        q, k, v = change(q, k, v)
        trie_attention(q, k, v, layout)


@pytest.mark.parametrize("name", ["scale", "softcap"])
@pytest.mark.parametrize("value", [0.0, -1.0, 1e-39, 1e19, float("nan"), float("inf"), True])
def test_a_scale_or_softcap_out_of_range_is_refused(name, value):
    layout = random_layout(14)
    q, k, v, _ = inputs(layout.num_tokens, torch.float32)
    with pytest.raises(ValueError, match=rf"{name} must be a number in \[1e-18, 1e\+18\]"):
        trie_attention(q, k, v, layout, **{name: value})


def test_backends_says_what_can_run_here():
    reasons = backends("trie_attention")
    assert reasons["dense"] is None
    assert reasons["segments"] is None
    assert set(reasons) == set(TRIE_ATTENTION)
    with pytest.raises(ValueError, match="no op 'softmax'"):
        backends("softmax")


def test_memory_of_a_layout_is_linear_in_its_tokens():
    def size(n: int) -> int:
        rng = np.random.default_rng(0)
        paths = [[0] * (n // 4) + rng.integers(1, 9, n // 8).tolist() for _ in range(6)]
        layout = Trie.from_paths(paths).layout()
        schedule = layout.block_schedule(128, 128)
        assert len(schedule.kv_blocks) <= (layout.num_tokens / 128) ** 2
        return layout.subtree_ends.nbytes + layout.nodes.nbytes

    assert size(80_000) <= 10.5 * size(8_000)
