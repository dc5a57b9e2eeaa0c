"""few_row_linear against float64, on every instruction set of this machine."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tw_kernels.linear import few_row_linear

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


def assert_is_the_product(rows: int, inputs: int, outputs: int, bias: bool = True) -> None:
    generator = torch.Generator().manual_seed(rows + inputs + outputs)
    x = torch.randn(rows, inputs, generator=generator)
    weight = torch.randn(outputs, inputs, generator=generator)
    b = torch.randn(outputs, generator=generator) if bias else None
    want = x.double() @ weight.double().T + (0 if b is None else b.double())
    got = few_row_linear(x, weight, b)
    assert got.dtype == torch.float32 and got.shape == (rows, outputs)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-6 * max(inputs, 1))


@pytest.mark.parametrize("rows", [*range(1, 10), 16, 33])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 96), (61, 37), (1, 1), (5, 200), (576, 33)])
def test_equals_the_product_in_float64(isa, rows, inputs, outputs):
    assert_is_the_product(rows, inputs, outputs)
    assert_is_the_product(rows, inputs, outputs, bias=False)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 20), st.integers(0, 70), st.integers(0, 70))
def test_takes_any_sizes(rows, inputs, outputs):
    assert_is_the_product(rows, inputs, outputs)


def test_a_row_depends_on_itself_alone_bit_for_bit(isa, threads):
    x, weight, bias = torch.randn(16, 300), torch.randn(1000, 300), torch.randn(1000)
    threads(2)
    together = few_row_linear(x, weight, bias)
    threads(1)
    for rows in range(1, 17):
        assert torch.equal(few_row_linear(x[:rows], weight, bias), together[:rows])
        assert torch.equal(few_row_linear(x[-rows:], weight, bias), together[-rows:])


def test_takes_leading_dimensions_and_any_strides():
    x, weight = torch.randn(7, 2, 3).permute(1, 2, 0), torch.randn(7, 5).T
    got = few_row_linear(x, weight, torch.randn(10)[::2])
    assert got.shape == (2, 3, 5)
    x = torch.randn(4, 2, 14)[:, :, ::2]
    torch.testing.assert_close(few_row_linear(x, weight), x @ weight.T)


@pytest.mark.parametrize(
    ("x", "weight", "bias", "message"),
    [
        (torch.ones(2, 3), torch.ones(4, 5), None, r"\(2, 3\), \(4, 5\), None"),
        (torch.ones(2, 3), torch.ones(4, 3), torch.ones(3), r"\(4, 3\), \(3,\)"),
        (torch.ones(2, 3).double(), torch.ones(4, 3), None, "float64"),
        (torch.ones(2, 3), torch.ones(4, 3).bfloat16(), None, "bfloat16"),
        (torch.ones(2, 3, device="meta"), torch.ones(4, 3), None, "meta"),
    ],
)
def test_what_does_not_fit_is_refused(x, weight, bias, message):
    with pytest.raises(ValueError, match=message):
        few_row_linear(x, weight, bias)
