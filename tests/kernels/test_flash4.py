"""The flash backend without a GPU: block-sparse tensors against the dense mask, refusals."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.tries import random_layout, visible
from tw_kernels import TrieLayout
from tw_kernels.attention import flash4
from tw_kernels.attention.op import choose_backend


def block_kinds(blocks: flash4.SparseBlocks, others: int) -> Tensor:
    """[M, others]: 0 where a pair of blocks is not listed, 1 under the mask, 2 full.

    Counts how often a pair is listed, so that none is read twice.
    """
    kinds = torch.zeros(blocks.mask_count.shape[2], others, dtype=torch.int32)
    lists = (blocks.mask_count, blocks.mask_index, 1), (blocks.full_count, blocks.full_index, 2)
    for count, index, kind in lists:
        assert count.dtype == index.dtype == torch.int32
        assert index.shape == (1, 1, len(kinds), others)
        for row, (n, listed) in enumerate(zip(count.flatten(), index[0, 0], strict=True)):
            taken = listed[:n].long()
            assert (taken.diff() > 0).all()  # ascending
            assert (kinds[row, taken] == 0).all()
            kinds[row, taken] = kind
    return kinds


def kinds_of_the_mask(mask: Tensor, block_q: int, block_kv: int) -> Tensor:
    """[row blocks, KV blocks]: 0 where no pair is visible, else 1, or 2 where no mask is needed.

    That is where all rows below N see all columns, and no column lies beyond N.
    """
    n = len(mask)
    kinds = torch.zeros(-(-n // block_q), -(-n // block_kv), dtype=torch.int32)
    for b in range(kinds.shape[0]):
        for c in range(kinds.shape[1]):
            part = mask[b * block_q : (b + 1) * block_q, c * block_kv : (c + 1) * block_kv]
            full = bool(part.all()) and part.shape[1] == block_kv
            kinds[b, c] = 2 if full else int(part.any())
    return kinds


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    blocks=st.sampled_from([(8, 8), (16, 8), (5, 7), (128, 128), (256, 128)]),
)
def test_block_sparse_tensors_are_the_dense_mask(seed, blocks):
    layout = random_layout(seed)
    plan = flash4.plan_of(layout, blocks)
    want = kinds_of_the_mask(visible(layout.subtree_ends), *blocks)
    rows = block_kinds(plan.rows, want.shape[1])
    columns = block_kinds(plan.columns, want.shape[0]).T
    assert torch.equal(rows, want)
    # A column's ranges may leave a full block to the mask, never a masked one without it.
    assert torch.equal(columns > 0, want > 0)
    assert (columns <= want).all()


def test_ends_are_padded_to_whole_blocks_and_hide_what_lies_beyond():
    plan = flash4.plan_of(TrieLayout(torch.full((700,), 700, dtype=torch.int32)), (256, 128))
    assert plan.ends.shape == (768,) and (plan.ends[700:] == 0).all()


def test_a_layout_keeps_its_plan():
    layout = random_layout(1)
    assert flash4.plan_of(layout, (128, 128)) is flash4.plan_of(layout, (128, 128))


def call(dtype: torch.dtype, head_dim: int, **variant: Any) -> str:
    q: Any = SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype, shape=(9, 4, head_dim))
    return choose_backend(q, q, q, random_layout(0), "flash", **variant)


def test_what_it_does_not_take_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(flash4, "_is_installed", lambda: True)
    for capability, found in (((8, 0), False), ((9, 0), True), ((10, 3), True), ((12, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        if found:
            assert call(torch.bfloat16, 128) == call(torch.float16, 64) == "flash"
        else:
            with pytest.raises(ValueError, match=f"9 to 11, not {capability[0]}"):
                call(torch.bfloat16, 128)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    refusals: list[tuple[torch.dtype, int, dict, str]] = [
        (torch.float32, 64, {}, "not torch.float32"),
        (torch.bfloat16, 96, {}, "head dims 64 and 128, not 96"),
        (torch.bfloat16, 64, {"window": 4}, "no window"),
        (torch.bfloat16, 64, {"softcap": 2.0}, "no soft cap"),
    ]
    for dtype, head_dim, variant, reason in refusals:
        with pytest.raises(ValueError, match=reason):
            call(dtype, head_dim, **variant)
    monkeypatch.setattr(flash4, "_is_installed", lambda: False)
    with pytest.raises(ValueError, match=r"pip install 'threadweaver\[flash\]'"):
        call(torch.bfloat16, 64)
