"""What windows, soft caps and sinks leave unread and unwritten in Triton's trie_decode.

On a GPU or in Triton's interpreter. test_decode.py compares all of them with the definition.
"""

import pytest
import torch

from tests.kernels.decode_batches import (
    Batch,
    Inputs,
    fork_join_batch,
    oracle,
    random_batch,
    random_inputs,
)
from tests.kernels.test_decode import RUNNABLE, run
from tests.kernels.tries import relative_error
from tw_kernels import DecodePlan, PlanSizes

pytestmark = [
    pytest.mark.skipif("triton" not in RUNNABLE, reason="triton cannot run here"),
    pytest.mark.usefixtures("poisoned_outputs"),
]


def readable(plan: DecodePlan, window: int) -> torch.Tensor:
    """[pages, page_size] bool: keys between the first and the last that rows of an item see."""
    found = torch.zeros(plan.num_pages, plan.page_size, dtype=torch.bool)
    pages, positions = plan.pages.long(), plan.positions
    for first_page, num_keys, start, first_row, end_row, _ in plan.items.tolist():
        at = start + torch.arange(num_keys)
        p = positions[first_row:end_row, None]
        seen = ((p - window < at) & (at <= p)).any(0).nonzero()[:, 0]
        if len(seen):
            keys = torch.arange(int(seen[0]), int(seen[-1]) + 1)
            found[pages[first_page + keys // plan.page_size], keys % plan.page_size] = True
    return found


BATCHES: dict[str, tuple[Batch, tuple[int, int, int]]] = {
    "decode": (random_batch(1, 8, 16, 60, 1), (2, 1, 16)),
    "prefill": (random_batch(11, 1, 8, 70, 70), (2, 2, 16)),
    "prefill beside readers": (random_batch(0, 4, 8, 40, 14), (4, 1, 16)),
    "many runs": (fork_join_batch(200, 10, prompts=1, threads=3, page_size=8), (2, 1, 16)),
    # The reader, far beyond the prompt's window, keeps two keys of the page that the prompt lacks.
    "prompt and far reader": (Batch([[0], [0, 1, 2]], [6, 20], [6, 1], 8, 3), (2, 1, 16)),
    "large pages": (random_batch(97, 4, 64, 90, 3), (3, 3, 32)),
}
VARIANTS = {
    "window": (7, None, False),
    "window of one": (1, None, False),
    "all": (45, 30.0, True),
}


def variant_of(name: str, heads: int) -> dict:
    window, softcap, sinks = VARIANTS[name]
    logits = torch.linspace(-3, 4, heads) if sinks else None
    return {"window": window, "softcap": softcap, "sinks": logits}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", BATCHES)
def test_nothing_out_of_the_windows_of_an_items_rows_is_read(name, variant):
    batch, heads = BATCHES[name]
    options = variant_of(variant, heads[0])
    inputs = random_inputs(batch, heads, torch.float32)
    want = oracle(batch, inputs, heads[2] ** -0.5, **options)
    plan = batch.plan(num_workers=6)
    unread = ~readable(plan, options["window"])
    inputs.kv.k_pages[: plan.num_pages][unread] = torch.nan
    inputs.kv.v_pages[: plan.num_pages][unread] = torch.nan
    got = run(batch, inputs, "triton", options, num_workers=6)
    assert relative_error(got, want) <= 1e-5


def test_the_batches_hold_items_that_no_row_sees_and_rows_that_see_nothing_of_an_item():
    whole, none = 0, 0
    for batch, _ in BATCHES.values():
        plan = batch.plan(num_workers=6)
        for _, num_keys, start, first_row, end_row, _ in plan.items.tolist():
            p = plan.positions[first_row:end_row]
            sees = (p >= start) & (p - 7 + 1 < start + num_keys)
            whole += not sees.any()
            none += bool(sees.any() and not sees.all())
    assert whole > 5
    assert none > 2


def test_a_sink_that_weighs_nothing_changes_no_bit():
    batch, heads = BATCHES["decode"]
    inputs = random_inputs(batch, heads, torch.float32)
    sinks = {"sinks": torch.full((heads[0],), -torch.inf)}
    assert torch.equal(run(batch, inputs, "triton", sinks), run(batch, inputs, "triton"))


def test_large_scores_saturate_at_the_soft_cap_and_large_sinks_take_all():
    batch, heads = BATCHES["decode"]
    inputs = random_inputs(batch, heads, torch.float32)
    inputs.q *= 1e30
    want = oracle(batch, inputs, heads[2] ** -0.5, softcap=5.0)
    assert relative_error(run(batch, inputs, "triton", {"softcap": 5.0}), want) <= 1e-5
    variant = {"softcap": 5.0, "sinks": torch.full((heads[0],), 1e4)}
    assert (run(batch, inputs, "triton", variant) == 0).all()


def test_padding_rows_are_zero_with_a_window_and_sinks():
    batch, heads = BATCHES["decode"]
    inputs = random_inputs(batch, heads, torch.float32)
    options = variant_of("all", heads[0])
    want = run(batch, inputs, "triton", options)

    def padded(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, torch.full((3, *x.shape[1:]), 7.0)])

    wide = Inputs(padded(inputs.q), inputs.kv, padded(inputs.new_k), padded(inputs.new_v))
    room = PlanSizes(*(n + 3 for n in batch.plan().size))
    got = run(batch, wide, "triton", options, capacity=room)
    assert torch.equal(got[: batch.num_rows], want)
    assert (got[batch.num_rows :] == 0).all()
