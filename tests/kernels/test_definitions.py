"""The float64 definitions that kernels are held to compute where their inputs are.

For a GPU stands a device whose tensors have shapes and dtypes but no numbers, and which refuse to
meet one of another device.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.conftest import on_a_gpu
from tests.kernels.decode_batches import Inputs, oracle, random_batch
from tests.kernels.rounding import gradient_terms
from tests.kernels.test_attention import run_oracle, run_sdpa
from tests.kernels.test_decode import unshared_sdpa
from tests.kernels.tries import oracle as attention_oracle
from tests.kernels.tries import visible, within
from tw_kernels import PagedKV

ELSEWHERE = "meta"


class Layout:
    """Of a trie elsewhere: all that the definition reads."""

    def __init__(self, n: int):
        self.subtree_ends = torch.empty(n, dtype=torch.int32, device=ELSEWHERE)


def test_attention_is_defined_on_the_device_of_its_inputs():
    with FakeTensorMode(allow_non_fake_inputs=True):
        q, k, v, dout = (
            torch.empty(9, h, 16, device=ELSEWHERE, dtype=torch.bfloat16, requires_grad=i < 3)
            for i, h in enumerate((4, 2, 2, 4))
        )
        layout, sinks = Layout(9), torch.empty(4, device=ELSEWHERE)
        mask = within(visible(layout.subtree_ends), 3)
        out, lse, grads = run_oracle(layout, [q, k, v, dout], 0.25)  # pyright: ignore
        capped = attention_oracle(q, k, v, mask, 0.25, 2.0, sinks)
        half, half_grads = run_sdpa(layout, [q, k, v, dout], 0.25)  # pyright: ignore
        terms = gradient_terms([q, k, v, dout], mask, 0.25)
        for x in (out, lse, *grads, *capped, half, *half_grads, *terms):
            assert x.device.type == ELSEWHERE
        assert out.dtype == lse.dtype == torch.float64


@pytest.mark.parametrize("variant", [{}, {"window": 5, "softcap": 2.0, "sinks": True}])
def test_decoding_is_defined_on_the_device_of_its_inputs(variant):
    batch = random_batch(3, 6, 16, 60, 5)
    with FakeTensorMode(allow_non_fake_inputs=True):
        rows = batch.num_rows
        pages = torch.empty(2, batch.num_pages, 16, 2, 32, device=ELSEWHERE, dtype=torch.bfloat16)
        q, new_k, new_v = (
            torch.empty(rows, h, 32, device=ELSEWHERE, dtype=torch.bfloat16) for h in (4, 2, 2)
        )
        inputs = Inputs(q, PagedKV(*pages), new_k, new_v)
        if "sinks" in variant:
            variant = {**variant, "sinks": torch.empty(4, device=ELSEWHERE)}
        out = oracle(batch, inputs, 0.25, **variant)
        assert out.device.type == ELSEWHERE and out.dtype == torch.float64
        assert out.shape == (rows, 4, 32)
        assert unshared_sdpa(batch, inputs, 0.25).device.type == ELSEWHERE


def test_a_test_on_a_gpu_takes_one_cpu_thread_and_gives_the_others_back():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(RuntimeError, match="planted"), on_a_gpu():
            assert torch.get_num_threads() == 1
            raise RuntimeError("planted")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
