"""Norms, rotary embedding, SwiGLU and log-softmax as fused kernels, against float64."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from tw_kernels import fused
from tw_kernels.fused import log_softmax
from tw_kernels.fused.rms_norm import add_rms_norm, rms_norm
from tw_kernels.fused.rotary import Norm, rotary
from tw_kernels.fused.swiglu import swiglu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Results are rounded once, from float32: half a unit in the last place, and the sums before it.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8}
DTYPES = list(TOLERANCE)
# Of autocast over float32 weights, and of a model of one dtype.
DTYPE_PAIRS = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
]
REASON = fused.why_not(torch.device(DEVICE))
pytestmark = [
    pytest.mark.usefixtures("poisoned_outputs"),
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]


def draw(*shape, dtype=torch.float32, scale=1.0):
    x = (scale * torch.randn(*shape, device=DEVICE)).to(dtype)
    return x.requires_grad_()


def doubles(*tensors):
    return [x.detach().double().requires_grad_() for x in tensors]


def check(got, want, dtype, name=""):
    """Of numbers that are sums of others as large as the largest."""
    assert got.dtype == dtype, name
    error = (got.double() - want).abs().max() / want.abs().max().clamp(min=1)
    assert error <= TOLERANCE[dtype], (name, error)


def norm64(x, weight, eps, offset):
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * (offset + weight)


@pytest.mark.parametrize("shape", [(1, 16), (2, 37, 96), (3, 2100)])
@pytest.mark.parametrize("x_dtype, out_dtype", DTYPE_PAIRS)
def test_rms_norm_and_its_gradients_equal_those_in_float64(shape, x_dtype, out_dtype):
    torch.manual_seed(0)
    offset, eps = 1.0, 1e-3
    x, weight = draw(*shape, dtype=x_dtype), draw(shape[-1])
    x64, weight64 = doubles(x, weight)
    got, want = rms_norm(x, weight, eps, offset, out_dtype), norm64(x64, weight64, eps, offset)
    check(got, want, out_dtype)
    dy = torch.randn_like(got)
    grads = torch.autograd.grad(got, (x, weight), dy)
    wanted = torch.autograd.grad(want, (x64, weight64), dy.double())
    check(grads[0], wanted[0], x_dtype, "dx")
    check(grads[1], wanted[1], torch.float32, "dweight")


@pytest.mark.parametrize("x_dtype, delta_dtype", DTYPE_PAIRS)
@pytest.mark.parametrize("used", ["both", "norm", "sum"])
def test_add_rms_norm_and_its_gradients_equal_those_in_float64(x_dtype, delta_dtype, used):
    torch.manual_seed(1)
    x, delta, weight = draw(9, 80, dtype=x_dtype), draw(9, 80, dtype=delta_dtype), draw(80)
    total, y = add_rms_norm(x, delta, weight, 1e-5, out_dtype=torch.bfloat16)
    wide = torch.promote_types(x_dtype, delta_dtype)
    assert torch.equal(total, x + delta) and total.dtype == wide
    x64, delta64, weight64 = doubles(x, delta, weight)
    # The norm is that of the rounded sum.
    total64 = x64 + delta64
    total64 = total64 + (total.double() - total64).detach()
    y64 = norm64(total64, weight64, 1e-5, 0.0)
    check(y, y64, torch.bfloat16)
    outputs = [(total, total64)] * (used != "norm") + [(y, y64)] * (used != "sum")
    douts = [torch.randn_like(got) for got, _ in outputs]
    inputs = (x, delta, weight) if used != "sum" else (x, delta)
    inputs64 = (x64, delta64, weight64)[: len(inputs)]
    grads = torch.autograd.grad([got for got, _ in outputs], inputs, douts)
    wanted = torch.autograd.grad([w for _, w in outputs], inputs64, [d.double() for d in douts])
    for grad, want, like in zip(grads, wanted, inputs, strict=True):
        check(grad, want, like.dtype)


def test_a_norm_of_a_transposed_or_an_empty_tensor():
    x, weight = draw(12, 4), draw(12)
    got = rms_norm(x.t(), weight, 1e-6)
    x64, weight64 = doubles(x.t(), weight)
    check(got, norm64(x64, weight64, 1e-6, 0.0), torch.float32)
    empty = draw(0, 12)
    grads = torch.autograd.grad(rms_norm(empty, weight, 1e-6).sum(), (empty, weight))
    assert grads[0].shape == (0, 12) and not grads[1].any()


def test_the_weight_of_a_norm_has_the_same_gradient_every_time():
    x, weight, dy = draw(50, 300), draw(300), torch.randn(50, 300, device=DEVICE)
    first, second = (
        torch.autograd.grad(rms_norm(x, weight, 1e-6), (x, weight), dy) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def rotated64(x, cos, sin):
    x1, x2 = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-x2, x1), -1) * sin[:, None]


@pytest.mark.parametrize("heads, dim", [((4, 2), 16), ((3, 1), 20)])
@pytest.mark.parametrize("x_dtype, out_dtype", DTYPE_PAIRS)
def test_rotary_and_its_gradients_equal_those_in_float64(heads, dim, x_dtype, out_dtype):
    torch.manual_seed(2)
    q, k = (draw(5, h, dim, dtype=x_dtype) for h in heads)
    # The two halves of an angle's row may differ.
    cos, sin = (draw(5, dim).detach() for _ in range(2))
    got = rotary(q, k, cos, sin, out_dtype)
    q64, k64 = doubles(q, k)
    want = [rotated64(x, cos.double(), sin.double()) for x in (q64, k64)]
    dout = [torch.randn_like(x) for x in got]
    grads = torch.autograd.grad(got, (q, k), dout)
    wanted = torch.autograd.grad(want, (q64, k64), [d.double() for d in dout])
    for mine, theirs in zip(got, want, strict=True):
        check(mine, theirs, out_dtype)
    for mine, theirs in zip(grads, wanted, strict=True):
        check(mine, theirs, x_dtype)


def normed_rotary(q, k, cos, sin, weights, offsets, out_dtype=None):
    """weights and offsets: of queries and of keys; offset None: no norm."""
    norms = [
        None if offset is None else Norm(weight, 1e-3, offset)
        for weight, offset in zip(weights, offsets, strict=True)
    ]
    return rotary(q, k, cos, sin, out_dtype, *norms)


def any_norm(offsets):
    return offsets != (None, None)


@pytest.mark.parametrize(
    "tokens, heads, dim, offsets, x_dtype, out_dtype",
    [
        (7, (5, 2), 64, (0.0, 1.0), *DTYPE_PAIRS[1]),
        (4, (3, 1), 96, (0.0, 0.0), *DTYPE_PAIRS[0]),
        (1, (2, 2), 128, (1.0, None), *DTYPE_PAIRS[2]),
        (2, (5, 3), 256, (1.0, 1.0), *DTYPE_PAIRS[0]),  # more heads than a tile of the gradient
        (5, (2, 5), 20, (None, 0.0), *DTYPE_PAIRS[1]),
    ],
)
def test_norms_and_rotary_and_their_gradients_equal_those_in_float64(
    tokens, heads, dim, offsets, x_dtype, out_dtype
):
    check_normed_rotary(tokens, heads, dim, offsets, x_dtype, out_dtype)


OFFSET = st.sampled_from([None, 0.0, 1.0])


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 9),
    st.tuples(st.integers(1, 7), st.integers(1, 3)),
    st.integers(1, 40).map(lambda half: 2 * half),
    st.tuples(OFFSET, OFFSET).filter(any_norm),
    st.sampled_from(DTYPE_PAIRS),
)
def test_norms_and_rotary_of_random_shapes_equal_those_in_float64(
    tokens, heads, dim, offsets, dtypes
):
    check_normed_rotary(tokens, heads, dim, offsets, *dtypes)


def check_normed_rotary(tokens, heads, dim, offsets, x_dtype, out_dtype):
    torch.manual_seed(5)
    q, k = (draw(tokens, h, dim, dtype=x_dtype) for h in heads)
    weights = draw(dim), draw(dim, dtype=x_dtype)
    cos, sin = (draw(tokens, dim).detach() for _ in range(2))
    got = normed_rotary(q, k, cos, sin, weights, offsets, out_dtype)
    tensors = doubles(q, k, *weights)
    want = [
        rotated64(x if offset is None else norm64(x, w, 1e-3, offset), cos.double(), sin.double())
        for x, w, offset in zip(tensors[:2], tensors[2:], offsets, strict=True)
    ]
    dout = [torch.randn_like(x) for x in got]
    used = [True, True, *(offset is not None for offset in offsets)]
    inputs, inputs64 = (
        [x for x, is_used in zip(of, used, strict=True) if is_used]
        for of in ((q, k, *weights), tensors)
    )
    grads = torch.autograd.grad(got, inputs, dout)
    wanted = torch.autograd.grad(want, inputs64, [d.double() for d in dout])
    for mine, theirs in zip(got, want, strict=True):
        check(mine, theirs, out_dtype)
    for mine, theirs, like in zip(grads, wanted, inputs, strict=True):
        check(mine, theirs, like.dtype)


def test_norms_and_rotary_of_no_token():
    q, k, weights = draw(0, 4, 16), draw(0, 2, 16), (draw(16), draw(16))
    cos = torch.ones(0, 16, device=DEVICE)
    got = normed_rotary(q, k, cos, cos, weights, (0.0, 0.0))
    grads = torch.autograd.grad([x.sum() for x in got], (q, k, *weights))
    assert [x.shape for x in (*got, *grads[:2])] == 2 * [q.shape, k.shape]
    assert not any(grad.any() for grad in grads[2:])


def test_norms_and_rotary_of_strided_tensors_and_of_one_weight_for_all():
    """Transposed heads, angles that have a gap, a weight that is one number."""
    q, k = draw(4, 3, 16), draw(2, 3, 16)
    cos, sin = torch.randn(2, 3, 32, device=DEVICE)[..., ::2]
    weight = draw(1).expand(16)
    got = normed_rotary(q.transpose(0, 1), k.transpose(0, 1), cos, sin, (weight,) * 2, (0.0, 0.0))
    for mine, x in zip(got, (q, k), strict=True):
        normed = norm64(x.detach().double().transpose(0, 1), weight.double(), 1e-3, 0.0)
        check(mine, rotated64(normed, cos.double(), sin.double()), torch.float32)


def test_the_norm_of_zeros_without_eps_leaves_the_gradients_of_other_heads_alone():
    """Rows of a tile that are no heads are zeros too."""
    q, k, weight = draw(2, 3, 16), draw(2, 1, 16), draw(16)
    cos = torch.ones(2, 16, device=DEVICE)
    got = rotary(q, k, cos, cos, None, Norm(weight, 0.0), Norm(weight, 0.0))
    grads = torch.autograd.grad([x.sum() for x in got], (q, k, weight))
    assert all(grad.isfinite().all() for grad in grads)


def test_weights_of_norms_before_a_rotation_have_the_same_gradient_every_time():
    q, k, weights = draw(7, 3, 32), draw(7, 2, 32), (draw(32), draw(32))
    cos, sin = torch.randn(2, 7, 32, device=DEVICE)
    dout = [torch.randn_like(x) for x in (q, k)]

    def gradients():
        got = normed_rotary(q, k, cos, sin, weights, (0.0, 1.0))
        return torch.autograd.grad(got, (q, k, *weights), dout)

    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))


def test_the_gradient_of_norms_and_rotary_keeps_nothing_but_what_came_in():
    q, k, weights = draw(5, 4, 32), draw(5, 2, 32), (draw(32), draw(32))
    cos, sin = torch.randn(2, 5, 32, device=DEVICE)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        normed_rotary(q, k, cos, sin, weights, (0.0, 0.0))
    came_in = {x.data_ptr() for x in (q, k, *weights, cos, sin)}
    assert {x.data_ptr() for x in kept} == came_in
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        rotary(q, k, cos, sin)
    assert {x.data_ptr() for x in kept} == {cos.data_ptr(), sin.data_ptr()}


@pytest.mark.parametrize("shape", [(1, 7), (3, 5, 401), (0, 8)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_and_its_gradients_equal_those_in_float64(shape, dtype):
    torch.manual_seed(3)
    gate, up = draw(*shape, dtype=dtype, scale=4), draw(*shape, dtype=dtype)
    gate64, up64 = doubles(gate, up)
    got, want = swiglu(gate, up), F.silu(gate64) * up64
    dout = torch.randn_like(got)
    grads = torch.autograd.grad(got, (gate, up), dout)
    wanted = torch.autograd.grad(want, (gate64, up64), dout.double())
    for mine, theirs in zip((got, *grads), (want, *wanted), strict=True):
        assert mine.shape == theirs.shape
        if mine.numel():
            check(mine, theirs, dtype)


TRANSFORMS = {
    "plain": log_softmax.Transform(1.0, None, 90, None),
    "scale": log_softmax.Transform(0.3, None, 90, None),
    "softcap": log_softmax.Transform(3.0, 2.0, 90, None),
    "rows": log_softmax.Transform(1.0, None, 71, None),
    "holes": log_softmax.Transform(0.3, 2.0, 71, torch.arange(71) % 7 == 3),
    # The first block of ids has no token at all.
    "late": log_softmax.Transform(1.0, None, 9000, torch.arange(9000) < 4500),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("entropies", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_log_softmax_and_its_gradient_equal_those_in_float64(name, entropies, dtype):
    torch.manual_seed(4)
    transform = TRANSFORMS[name]
    if transform.unknown is not None:
        transform = transform._replace(unknown=transform.unknown.to(DEVICE))
    x = draw(6, max(96, transform.rows + 8), dtype=dtype, scale=6)
    known = torch.arange(x.shape[1], device=DEVICE) < transform.rows
    if transform.unknown is not None:
        known[: transform.rows] &= ~transform.unknown
    ids = known.nonzero()[:, 0]
    targets = ids[torch.tensor([0, 3, 5, 7, 11, -1], device=DEVICE)]
    (x64,) = doubles(x)
    z = transform.scale * x64
    if transform.softcap is not None:
        z = transform.softcap * torch.tanh(z / transform.softcap)
    logp = z[:, ids].log_softmax(-1)
    want = logp.gather(1, torch.searchsorted(ids, targets)[:, None])[:, 0]
    wanted_entropies = -(logp.exp() * logp).sum(-1)

    products = x.detach().clone()
    found = log_softmax.statistics(products, targets, transform)
    assert torch.equal(products, x)
    check(found.logprobs, want, torch.float32)
    torch.testing.assert_close(found.entropies.double(), wanted_entropies, rtol=1e-5, atol=2e-5)
    dlogp, dentropy = torch.randn(2, 6, device=DEVICE)
    outputs = [(want, dlogp.double())] + [(wanted_entropies, dentropy.double())] * entropies
    (wanted_grad,) = torch.autograd.grad(
        [out for out, _ in outputs], x64, [dout for _, dout in outputs]
    )
    got = log_softmax.gradient_(
        products, targets, transform, found, dlogp, dentropy if entropies else None
    )
    assert got is products
    tolerance = 2e-5 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(got.double(), wanted_grad, rtol=tolerance, atol=tolerance)
    assert not got[:, ~known].any()


def test_kernels_run_on_the_device_of_their_tensors_not_on_the_current_one(monkeypatch):
    devices_of = []
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: devices_of.append(x) or nullcontext())
    gate = torch.ones(3, 8, device=DEVICE)
    swiglu(gate, gate)
    assert [x.data_ptr() for x in devices_of] == [gate.data_ptr()]


def test_an_id_without_a_token_has_a_finite_log_probability():
    transform = log_softmax.Transform(1.0, None, 4, torch.tensor([True, False, False, False]))
    x, target = torch.zeros(1, 4), torch.tensor([0])
    found = log_softmax.statistics(x.to(DEVICE), target.to(DEVICE), transform)
    assert found.logprobs.isfinite().all() and found.logprobs.item() < -1e38
