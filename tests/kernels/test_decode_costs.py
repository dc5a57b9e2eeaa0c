"""How a plan is cut for a GPU: a model of costs, and what it makes of the cases that were measured.

Run with `pytest -s` to see what the model expects. It is no measurement.
"""

import pytest

from tests.kernels.decode_batches import fork_join_batch, random_batch
from tw_kernels import DecodePlan
from tw_kernels.decode.costs import HOPPER, Heads, of_cpu, of_gpu

HEADS = Heads(query=32, kv=8, dim=128)
H100 = of_gpu(132, HEADS)
TFLOPS = 779e3  # operations of a matrix product in a nanosecond, measured on an H100


def plan_of(threads: int, prefix: int, suffix: int, **options) -> DecodePlan:
    batch = fork_join_batch(prefix, suffix, prompts=1, threads=threads, page_size=16)
    return batch.plan(num_workers=132, **{"costs": H100, **options})


def floor(threads: int, prefix: int, suffix: int) -> float:
    """Nanoseconds to read the distinct keys and values, or to multiply, whichever is longer."""
    kv_bytes = 4 * HEADS.kv * HEADS.dim * (prefix + threads * suffix)
    operations = 4 * HEADS.query * HEADS.dim * threads * (prefix + suffix)
    return max(kv_bytes / HOPPER.memory, operations / TFLOPS)


CASES = [  # threads, shared and own tokens; most partial results of a row; most of the floor
    ((8, 8192, 128), 17, 1.4),
    ((64, 8192, 128), 8, 1.4),
    ((512, 8192, 128), 3, 1.8),
    ((64, 4096, 4096), 2, 1.08),
]


@pytest.mark.parametrize(("case", "most_partials", "most"), CASES)
def test_partial_results_are_few_and_the_model_is_near_the_floor(case, most_partials, most):
    plan = plan_of(*case)
    partials, units = int(plan.merge_ptr.diff().max()), HEADS.kv * plan.size.items
    ratio = plan.predicted / floor(*case)
    print(f"{case}: {partials} partial results a row, {units} units of work, "
          f"a model of {plan.predicted / 1e3:.1f} us, {ratio:.2f} of the floor")  # fmt: skip
    assert partials <= most_partials
    assert 1 <= ratio <= most


def kinds(plan: DecodePlan) -> list[bool]:
    """Of the items in their order: whether they are wide."""
    return [(end - first) * H100.group > 64 for *_, first, end, _ in plan.items.tolist()]


@pytest.mark.parametrize("case", [case for case, *_ in CASES])
def test_every_multiprocessor_has_work_from_the_start(case):
    assert HEADS.kv * plan_of(*case).size.items >= 0.95 * H100.workers


@pytest.mark.parametrize("case", [(64, 8192, 128), (512, 8192, 128)])
def test_wide_items_and_streaming_ones_run_side_by_side(case):
    at_once = -(-H100.workers // HEADS.kv)
    order = kinds(plan_of(*case))
    assert 0.1 * at_once < sum(order[:at_once]) < 0.9 * at_once
    # The last third of the calls' time is left for the wide items that began by then.
    assert sum(order[: 2 * len(order) // 3]) >= 0.8 * sum(order)
    assert not order[-1]  # short ones end together


@pytest.mark.parametrize("wide", [False, True])
def test_of_each_kind_most_work_begins_first(wide):
    batch = random_batch(5, sequences=60, page_size=16, longest=4000)
    plan = batch.plan(costs=H100, num_workers=4)
    assert set(kinds(plan)) == {False, True}
    work = [
        H100.unit + keys * max(H100.fetch, H100.product * -(-(end - first) * H100.group // 64))
        for (_, keys, _, first, end, _), is_wide in zip(
            plan.items.tolist(), kinds(plan), strict=True
        )
        if is_wide == wide
    ]
    assert work == sorted(work, reverse=True)


@pytest.mark.parametrize(("query", "kv", "rows"), [(8, 8, 128), (32, 8, 32), (64, 1, 2)])
def test_an_item_has_as_many_rows_as_one_tile_serves(query, kv, rows):
    plan = plan_of(300, 512, 16, costs=of_gpu(132, Heads(query, kv, 128)))
    assert plan.tile_rows == rows
    assert max(end - first for *_, first, end, _ in plan.items.tolist()) == rows


def test_dearer_partial_results_cut_less():
    counts = [
        int(plan_of(64, 8192, 128, costs=H100._replace(partial=x * H100.partial)).merge_ptr[-1])
        for x in (0, 1, 30)
    ]
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1]


def test_a_finer_cut_must_promise_two_percent():
    for case, *_ in CASES:
        chosen = plan_of(*case)
        for waves in H100.waves:
            other = plan_of(*case, costs=H100._replace(waves=(waves,)))
            if other.size.items > chosen.size.items:
                assert other.predicted >= 0.98 * chosen.predicted


def test_a_cpu_goes_on_cutting_for_two_items_a_thread():
    # The plan of before: 8 rows of 8,192 shared keys and 128 of their own, for four threads.
    plan = fork_join_batch(8192, 128, 1, 8, 16).plan(costs=of_cpu(4), num_workers=4)
    assert sorted({keys for _, keys, *_ in plan.items.tolist()}) == [128, 1024]
    assert plan.tile_rows == 64
