"""Which launch of Triton's decode kernel takes which items."""

import itertools

import pytest
import torch

from tw_kernels import DecodePlan, PagedKV, triton_interpreter
from tw_kernels.decode.triton_tiles import launches_for


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("interpreted", [True, False])
@pytest.mark.parametrize("rows", [1, 4, 16, 32])
def test_every_item_is_in_exactly_one_launch(monkeypatch, rows, interpreted, head_dim, dtype):
    monkeypatch.setattr(triton_interpreter, "is_on", lambda: interpreted)
    pages = torch.zeros(8, 16, 2, head_dim, dtype=dtype)
    plan = DecodePlan.build([list(range(8))], [120], [rows], 16)
    q = torch.zeros(rows, 8, head_dim, dtype=dtype)
    launches = sorted(
        launches_for(q, PagedKV(pages, pages.clone()), plan), key=lambda launch: launch.least
    )
    assert launches[0].least == 1 and launches[-1].most >= 4 * rows
    for below, above in itertools.pairwise(launches):
        assert above.least == below.most + 1 and below.config.block_m < above.config.block_m
