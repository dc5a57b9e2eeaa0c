"""The bound that gradients are held to, and the poison that shows what was never written."""

import pytest
import torch

from tests.kernels.rounding import allowed, gradient_terms
from tests.kernels.test_attention import LAYOUTS, inputs, run_oracle
from tests.kernels.tries import visible

ALONE = ["one token", "roots of one token"]


def terms_of(name: str, scale: float = 0.3) -> tuple:
    layout = LAYOUTS[name]()
    tensors = inputs(layout.num_tokens, torch.float32)
    terms = gradient_terms(tensors, visible(layout.subtree_ends), scale)
    return tensors, terms, run_oracle(layout, tensors, scale)[2]


@pytest.mark.parametrize("name", ALONE)
def test_a_gradient_that_cancels_is_held_to_its_terms(name):
    (_, k, v, dout), terms, want = terms_of(name)
    assert [x.norm().item() for x in want[:2]] == [0, 0]
    kv = [x.repeat_interleave(3, 1).double() for x in (k, v)]
    slope = (dout * kv[1]).sum(-1, keepdim=True)
    # What is left of dq where delta is rounded to float32 is within the bound; where it is rounded
    # to half precision or forgotten, it is not.
    for delta, right in ((slope.float(), True), (slope.bfloat16(), False), (0 * slope, False)):
        dq = (slope - delta) * kv[0] * 0.3
        assert (dq.norm() <= allowed(1e-5, want[0], terms[0])) == right
    assert (terms[2] >= want[2].abs()).all()


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name not in ALONE])
def test_elsewhere_a_float32_gradient_is_held_to_itself(name):
    _, terms, want = terms_of(name)
    for x, sizes in zip(want, terms, strict=True):
        assert (sizes >= x.abs()).all()
        assert allowed(1e-5, x, sizes) == 1e-5 * x.norm().item()


def test_new_tensors_are_nan_where_their_dtype_has_one(poisoned_outputs):
    new = torch.empty(3, dtype=torch.bfloat16)
    assert new.isnan().all() and torch.empty_like(new).isnan().all()
    # As triton.testing.do_bench takes its buffer.
    assert torch.empty(3, dtype=torch.int).shape == (3,)
