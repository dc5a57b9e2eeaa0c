"""trie_decode on every backend that runs here, against a float64 oracle on random forests."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.kernels.decode_batches import (
    Batch,
    Inputs,
    fork_join_batch,
    oracle,
    random_batch,
    random_inputs,
)
from tests.kernels.tries import random_paths, relative_error, visible
from tw_kernels import DecodePlan, PagedKV, PlanSizes, Trie, backends, trie_decode
from tw_kernels.decode.op import TRIE_DECODE, choose_backend
from tw_kernels.scores import ScoreOptions

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = [torch.bfloat16, torch.float16]
# Triton runs in its interpreter here, some ten thousand times slower than on a GPU: it gets small
# cases of its own below. The CUDA kernels have theirs in test_cuda_decode_gpu.py.
RUNNABLE = [name for name, why in backends("trie_decode").items() if why is None and name != "cuda"]
FAST = [name for name in RUNNABLE if name != "triton"]


def run(
    batch: Batch, inputs: Inputs, backend: str, variant: dict | None = None, **options
) -> torch.Tensor:
    """On fresh copies of the pages, from and to the CPU. variant: window, softcap, sinks."""
    on_device = Inputs(
        inputs.q.to(DEVICE),
        PagedKV(inputs.kv.k_pages.clone().to(DEVICE), inputs.kv.v_pages.clone().to(DEVICE)),
        inputs.new_k.to(DEVICE),
        inputs.new_v.to(DEVICE),
    )
    plan = batch.plan(device=DEVICE, **options)
    variant = {
        name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x
        for name, x in (variant or {}).items()
    }
    return trie_decode(**on_device.call(), plan=plan, backend=backend, **variant).cpu()


def supported(inputs: Inputs, backend: str, variant: dict | None = None) -> bool:
    on_device = PagedKV(inputs.kv.k_pages.to(DEVICE), inputs.kv.v_pages.to(DEVICE))
    options = ScoreOptions(**variant or {})
    return TRIE_DECODE[backend].why_not(inputs.q.to(DEVICE), on_device, options) is None


def unshared_sdpa(batch: Batch, inputs: Inputs, scale: float) -> torch.Tensor:
    """PyTorch's attention, one sequence at a time over its own keys: the error to measure by."""
    inputs = inputs.copy()
    pages = [x.flatten(0, 1) for x in (inputs.kv.k_pages, inputs.kv.v_pages)]
    outs, first = [], 0
    for s, new in enumerate(batch.new_tokens):
        slots, rows = batch.slots(s).to(inputs.q.device), slice(first, first + new)
        for x, fresh in zip(pages, (inputs.new_k, inputs.new_v), strict=True):
            x[slots[-new:]] = fresh[rows]
        k, v = (x[slots].transpose(0, 1)[None] for x in pages)
        visible = torch.arange(len(slots)) <= torch.tensor(batch.positions(s))[:, None]
        visible = visible.to(inputs.q.device)
        q = inputs.q[rows].transpose(0, 1)[None]
        out = F.scaled_dot_product_attention(q, k, v, visible, scale=scale, enable_gqa=True)
        outs.append(out[0].transpose(0, 1))
        first += new
    return torch.cat(outs)


@pytest.mark.parametrize("backend", FAST)
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    sequences=st.integers(1, 10),
    page_size=st.sampled_from([8, 16, 64, 256]),
    longest=st.sampled_from([3, 50, 300]),
    most_new=st.sampled_from([1, 5, 200]),
    kv_heads=st.sampled_from([1, 3]),
    group=st.sampled_from([1, 2, 3, 8]),
    head_dim=st.sampled_from([32, 64, 128, 256]),
    workers=st.sampled_from([1, 16]),
    tile_rows=st.sampled_from([5, 64]),
    share=st.booleans(),
)
def test_random_forests_agree_with_the_oracle(
    backend, seed, sequences, page_size, longest, most_new, kv_heads, group, head_dim, workers,
    tile_rows, share,
):  # fmt: skip
    batch = random_batch(seed, sequences, page_size, longest, most_new)
    inputs = random_inputs(batch, (kv_heads * group, kv_heads, head_dim), torch.float32, seed % 997)
    if not supported(inputs, backend):
        return
    got = run(batch, inputs, backend, num_workers=workers, tile_rows=tile_rows, share=share)
    # Slots beyond the lengths hold NaN, as do those of new tokens until the call writes them.
    assert relative_error(got, oracle(batch, inputs, head_dim**-0.5)) <= 1e-5


@pytest.mark.skipif("triton" not in RUNNABLE, reason="triton cannot run here")
# Not shrunk: in the interpreter that would take minutes.
@settings(max_examples=12, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    seed=st.integers(0, 2**32 - 1),
    page_size=st.sampled_from([8, 16, 32, 64]),
    longest=st.sampled_from([3, 40]),
    most_new=st.sampled_from([1, 8]),
    group=st.sampled_from([1, 3, 16]),
    tile_rows=st.sampled_from([3, 64]),
)
def test_random_small_forests_agree_with_the_oracle_in_triton(
    seed, page_size, longest, most_new, group, tile_rows
):
    batch = random_batch(seed, 4, page_size, longest, most_new)
    inputs = random_inputs(batch, (group, 1, 32), torch.float32, seed % 997)
    got = run(batch, inputs, "triton", tile_rows=tile_rows)
    assert relative_error(got, oracle(batch, inputs, 32**-0.5)) <= 1e-5


VARIANTS = {
    "nothing": {},
    "window": {"window": 20},
    "softcap": {"softcap": 0.7},
    "sinks": {"sinks": torch.tensor([0.5, -torch.inf, 3.0, -2.0, 0.0, 1.0])},
    "window and softcap": {"window": 16, "softcap": 2.0},
    "window and sinks": {"window": 5, "sinks": torch.linspace(-3, 4, 6).bfloat16()},
    "softcap and sinks": {"softcap": 30.0, "sinks": torch.linspace(-3, 4, 6).double()},
    "all": {"window": 1, "softcap": 0.7, "sinks": torch.linspace(-3, 4, 6).half()},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_the_reference_is_exact_in_float64(variant):
    batch = random_batch(5, sequences=8, page_size=16, longest=100, most_new=30)
    inputs = random_inputs(batch, (6, 2, 32), torch.float64)
    got = run(batch, inputs, "reference", variant)
    assert relative_error(got, oracle(batch, inputs, 32**-0.5, **variant)) <= 1e-14


@pytest.mark.parametrize("backend", FAST)
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    page_size=st.sampled_from([8, 16, 64]),
    longest=st.sampled_from([3, 50, 300]),
    most_new=st.sampled_from([1, 5, 200]),
    group=st.sampled_from([1, 3, 8]),
    window=st.sampled_from([None, 1, 7, 16, 17, 64, 100, 250]),
    softcap=st.sampled_from([None, 0.3, 5.0, 1e4]),
    sinks=st.sampled_from([None, torch.float32, torch.bfloat16]),
    tile_rows=st.sampled_from([5, 64]),
    share=st.booleans(),
)
def test_random_forests_in_windows_under_soft_caps_and_with_sinks_agree_with_the_oracle(
    backend, seed, page_size, longest, most_new, group, window, softcap, sinks, tile_rows, share,
):  # fmt: skip
    batch = random_batch(seed, 8, page_size, longest, most_new)
    inputs = random_inputs(batch, (2 * group, 2, 32), torch.float32, seed % 997)
    logits = 2 * torch.randn(2 * group, generator=torch.Generator().manual_seed(seed % 991))
    variant = {
        "window": window,
        "softcap": softcap,
        "sinks": None if sinks is None else logits.to(sinks),
    }
    if not supported(inputs, backend, variant):
        return
    got = run(batch, inputs, backend, variant, num_workers=4, tile_rows=tile_rows, share=share)
    assert relative_error(got, oracle(batch, inputs, 32**-0.5, **variant)) <= 1e-5


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("backend", FAST)
def test_a_prefill_of_paths_equals_attention_over_their_trie(backend, variant):
    """By the definition of trie_attention in float64: ancestors at most window - 1 levels up."""
    trie = Trie.from_paths(random_paths(np.random.default_rng(3), 2, 4, 25))
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(len(trie), h, 32, generator=generator) for h in (6, 2, 2))
    paths = [trie.path_nodes(p) for p in range(len(trie.path_ends))]
    lengths = [len(path) for path in paths]
    pages = iter(range(10**9))
    tables = [[next(pages) for _ in range(-(-n // 8))] for n in lengths]
    batch = Batch(tables, lengths, lengths, page_size=8, num_pages=next(pages))
    nodes = torch.cat(paths)
    empty = torch.full((batch.num_pages, 8, 2, 32), torch.nan)
    inputs = Inputs(q[nodes], PagedKV(empty, empty.clone()), k[nodes], v[nodes])
    if not supported(inputs, backend, variant):
        pytest.skip(f"{backend} does not run it")

    scores = torch.einsum("ihd,jhd->hij", q.double(), k.double().repeat_interleave(3, 1)) * 32**-0.5
    if softcap := variant.get("softcap"):
        scores = softcap * (scores / softcap).tanh()
    levels_up = trie.positions[:, None] - trie.positions
    seen = visible(trie.layout().subtree_ends) & (levels_up < variant.get("window", 10**9))
    weights = scores.masked_fill(~seen, -torch.inf).exp()
    sinks = variant.get("sinks", torch.full((6,), -torch.inf)).double()
    weights /= weights.sum(2, keepdim=True) + sinks.exp()[:, None, None]
    want = torch.einsum("hij,jhd->ihd", weights, v.double().repeat_interleave(3, 1))
    assert relative_error(run(batch, inputs, backend, variant), want[nodes]) <= 1e-5


SMALL = {
    # seed, sequences, page size, longest, most new; (Hq, Hkv, D)
    "decode": (1, 8, 16, 60, 1, (6, 2, 32)),
    "prefill": (11, 1, 8, 45, 45, (2, 2, 64)),
    "prefill beside readers": (0, 4, 8, 40, 14, (4, 1, 32)),
    "large pages": (97, 4, 64, 90, 3, (3, 3, 64)),
    "largest pages": (252, 3, 256, 280, 1, (8, 1, 128)),
    "one": (0, 1, 32, 70, 1, (2, 1, 256)),
}


def test_the_small_forests_share_pages_and_one_hides_a_run_from_some_of_its_rows():
    for name, (*sizes, _) in SMALL.items():
        plan = random_batch(*sizes).plan()
        unshared = random_batch(*sizes).plan(share=False)
        alone = name in ("prefill", "one")
        assert (plan.size.pages < unshared.size.pages) == (not alone), name
    plan = random_batch(*SMALL["prefill beside readers"][:-1]).plan()
    firsts = [(plan.positions[first:end], at) for _, _, at, first, end, _ in plan.items.tolist()]
    assert any((positions < at).any() for positions, at in firsts)


@pytest.mark.parametrize("backend", RUNNABLE)
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("shape", SMALL)
def test_small_forests_agree_with_the_oracle(shape, share, backend):
    *sizes, heads = SMALL[shape]
    batch = random_batch(*sizes)
    inputs = random_inputs(batch, heads, torch.float32)
    got = run(batch, inputs, backend, share=share)
    assert relative_error(got, oracle(batch, inputs, heads[2] ** -0.5)) <= 1e-5


@pytest.mark.parametrize("backend", RUNNABLE)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_every_variant_agrees_with_the_oracle_and_leaves_no_nan(variant, backend):
    batch = random_batch(9, sequences=5, page_size=16, longest=50, most_new=4)
    inputs = random_inputs(batch, (6, 2, 32), torch.float32)
    if not supported(inputs, backend, variant):
        pytest.skip(f"{backend} does not run it")
    # Pieces of a run that lie before all windows leave partial results of weight 0.
    got = run(batch, inputs, backend, variant, num_workers=50)
    assert relative_error(got, oracle(batch, inputs, 32**-0.5, **variant)) <= 1e-5


@pytest.mark.parametrize("backend", RUNNABLE)
@pytest.mark.parametrize("window", [400, 2**31 - 1, 2**80])
def test_a_window_larger_than_every_sequence_changes_no_bit(window, backend):
    batch = random_batch(14, sequences=5, page_size=8, longest=60, most_new=9)
    assert max(batch.lengths) <= 400
    inputs = random_inputs(batch, (4, 2, 32), torch.float32)
    if not supported(inputs, backend, {"window": window}):
        pytest.skip(f"{backend} does not run it")
    got = run(batch, inputs, backend, {"window": window})
    assert torch.equal(got, run(batch, inputs, backend))


@pytest.mark.parametrize("backend", RUNNABLE)
def test_a_sink_that_is_nan_makes_its_head_nan_and_no_other(backend):
    batch = random_batch(14, sequences=2, page_size=8, longest=20, most_new=2)
    inputs = random_inputs(batch, (2, 2, 32), torch.float32)
    sinks = {"sinks": torch.tensor([torch.nan, 0.0])}
    if not supported(inputs, backend, sinks):
        pytest.skip(f"{backend} does not run it")
    got = run(batch, inputs, backend, sinks)
    assert got[:, 0].isnan().all() and got[:, 1].isfinite().all()


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("window", [None, 11])
def test_what_a_row_does_not_see_cannot_reach_it(window, value, backend):
    """NaN or infinite keys and values of later tokens, of tokens before its window, of others."""
    if backend not in RUNNABLE:
        pytest.skip(f"{backend} cannot run here")
    batch = random_batch(0, 4, 8, 40, 14)
    inputs = random_inputs(batch, (4, 1, 32), torch.float32)
    variant = {} if window is None else {"window": window}
    want = run(batch, inputs, backend, variant, num_workers=1)
    held = [(s, p) for s in range(len(batch.lengths)) for p in range(batch.lengths[s])]
    reached = unreached = 0
    for s, p in held[::9]:
        slot = int(batch.slots(s)[p])
        poisoned = inputs.copy()
        poisoned.new_k, poisoned.new_v = inputs.new_k.clone(), inputs.new_v.clone()
        sees = []
        for reader in range(len(batch.tables)):
            at = (batch.slots(reader) == slot).nonzero().flatten().tolist()
            for position in batch.positions(reader):
                if position in at:
                    poisoned.new_k[len(sees)] = poisoned.new_v[len(sees)] = value
                sees.append(any(0 <= position - a < (window or 10**9) for a in at))
        poisoned.kv.k_pages.flatten(0, 1)[slot] = value
        poisoned.kv.v_pages.flatten(0, 1)[slot] = value
        got = run(batch, poisoned, backend, variant, num_workers=1)
        assert got[torch.tensor(sees)].isnan().all()
        torch.testing.assert_close(got[~torch.tensor(sees)], want[~torch.tensor(sees)])
        reached, unreached = reached + sum(sees), unreached + len(sees) - sum(sees)
    assert reached > 20 and unreached > 20


@pytest.mark.parametrize("backend", RUNNABLE)
def test_a_row_merges_the_many_pieces_of_a_long_run(backend):
    batch = fork_join_batch(prefix=1280, suffix=10, prompts=1, threads=2, page_size=64)
    assert batch.plan(num_workers=100).merge_ptr.tolist() == [0, 21, 42]
    inputs = random_inputs(batch, (2, 1, 32), torch.float32)
    got = run(batch, inputs, backend, num_workers=100)
    assert relative_error(got, oracle(batch, inputs, 32**-0.5)) <= 1e-5


@pytest.mark.parametrize("backend", RUNNABLE)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_is_no_worse_than_sdpa(dtype, backend):
    batch = fork_join_batch(prefix=128, suffix=20, prompts=1, threads=4, page_size=16)
    inputs = random_inputs(batch, (4, 2, 64), dtype)
    if not supported(inputs, backend):
        pytest.skip(f"{backend} does not run {dtype}")
    scale = 64**-0.5
    want = oracle(batch, inputs, scale)
    usual = relative_error(unshared_sdpa(batch, inputs, scale), want)
    assert relative_error(run(batch, inputs, backend), want) <= 1.5 * usual


@pytest.mark.parametrize("backend", RUNNABLE)
def test_new_keys_and_values_go_to_their_slots_and_nowhere_else(backend):
    batch = random_batch(12, sequences=5, page_size=8, longest=30, most_new=6)
    inputs = random_inputs(batch, (2, 1, 32), torch.float32)
    before = inputs.kv.k_pages.flatten(0, 1).clone(), inputs.kv.v_pages.flatten(0, 1).clone()
    kv = PagedKV(inputs.kv.k_pages.to(DEVICE), inputs.kv.v_pages.to(DEVICE))
    new = inputs.new_k.to(DEVICE), inputs.new_v.to(DEVICE)
    trie_decode(
        inputs.q.to(DEVICE), kv, batch.plan(device=DEVICE), backend=backend,
        new_k=new[0], new_v=new[1],
    )  # fmt: skip
    fresh = torch.cat([batch.slots(s)[-n:] for s, n in enumerate(batch.new_tokens)])
    after = kv.k_pages, kv.v_pages
    for pages, old, given_ in zip(after, before, (inputs.new_k, inputs.new_v), strict=True):
        old[fresh] = given_
        torch.testing.assert_close(
            pages.cpu().flatten(0, 1), old, rtol=0, atol=0, equal_nan=True
        )  # fmt: skip


@pytest.mark.parametrize("backend", RUNNABLE)
def test_pages_that_hold_the_new_tokens_already_need_no_writing(backend):
    batch = random_batch(13, sequences=4, page_size=8, longest=30, most_new=4)
    inputs = random_inputs(batch, (2, 1, 32), torch.float32)
    want = run(batch, inputs, backend)
    fresh = torch.cat([batch.slots(s)[-n:] for s, n in enumerate(batch.new_tokens)])
    kv = inputs.copy().kv
    kv.k_pages.flatten(0, 1)[fresh] = inputs.new_k
    kv.v_pages.flatten(0, 1)[fresh] = inputs.new_v
    kv = PagedKV(kv.k_pages.to(DEVICE), kv.v_pages.to(DEVICE))
    got = trie_decode(inputs.q.to(DEVICE), kv, batch.plan(device=DEVICE), backend=backend)
    assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("backend", RUNNABLE)
def test_the_same_call_gives_the_same_bits(backend):
    batch = random_batch(14, sequences=5, page_size=8, longest=60, most_new=2)
    inputs = random_inputs(batch, (4, 2, 32), torch.float32)
    assert torch.equal(run(batch, inputs, backend), run(batch, inputs, backend))


@pytest.mark.parametrize("backend", RUNNABLE)
def test_no_gradients_flow(backend):
    batch = random_batch(14, sequences=3, page_size=8, longest=30, most_new=2)
    inputs = random_inputs(batch, (2, 1, 32), torch.float32)
    want = run(batch, inputs, backend)
    for x in (inputs.q, inputs.new_k, inputs.new_v):
        x.requires_grad_()
    got = run(batch, inputs, backend)
    assert not got.requires_grad and torch.equal(got, want)


@pytest.mark.parametrize("backend", RUNNABLE)
def test_a_padded_plan_gives_the_same_bits_and_zero_in_padding_rows(backend):
    batch = random_batch(15, sequences=4, page_size=8, longest=40, most_new=2)
    inputs = random_inputs(batch, (2, 1, 32), torch.float32)
    want = run(batch, inputs, backend)
    rows = batch.num_rows

    def padded(x):
        return torch.cat([x, torch.full((3, *x.shape[1:]), 7.0)])

    wide = Inputs(padded(inputs.q), inputs.kv, padded(inputs.new_k), padded(inputs.new_v))
    room = PlanSizes(*(n + 3 for n in batch.plan().size))
    got = run(batch, wide, backend, capacity=room)
    assert torch.equal(got[:rows], want)
    assert (got[rows:] == 0).all()


@pytest.mark.parametrize("backend", RUNNABLE)
def test_heads_and_pages_may_be_strided_views(backend):
    batch = random_batch(16, sequences=3, page_size=8, longest=30, most_new=2)
    inputs = random_inputs(batch, (4, 2, 32), torch.float32)
    want = run(batch, inputs, backend)
    # As an engine has them: one projection for q, k and v, one pool for all layers.
    qkv = torch.cat([inputs.q, inputs.new_k, inputs.new_v], 1)
    pool = torch.stack([inputs.kv.k_pages, inputs.kv.v_pages], 1).repeat(1, 1, 2, 1, 1)
    pool = pool.to(DEVICE)
    kv = PagedKV(pool[:, 0, :8], pool[:, 1, :8])
    q, new_k, new_v = qkv.to(DEVICE).split([4, 2, 2], 1)
    plan = batch.plan(device=DEVICE)
    got = trie_decode(q, kv, plan, backend=backend, new_k=new_k, new_v=new_v)
    assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("backend", RUNNABLE)
def test_large_scores_do_not_overflow(backend):
    batch = fork_join_batch(prefix=64, suffix=10, prompts=1, threads=2, page_size=8)
    inputs = random_inputs(batch, (2, 1, 32), torch.float32)
    inputs.q *= 1e3
    got = run(batch, inputs, backend)
    torch.testing.assert_close(got, oracle(batch, inputs, 32**-0.5).float(), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("backend", RUNNABLE)
def test_an_empty_batch_gives_an_empty_output(backend):
    pages = torch.zeros(1, 16, 1, 32, device=DEVICE)
    plan = DecodePlan.build([], [], [], 16, DEVICE)
    q, new = torch.empty(0, 2, 32, device=DEVICE), torch.empty(0, 1, 32, device=DEVICE)
    kv = PagedKV(pages, pages.clone())
    out = trie_decode(q, kv, plan, backend=backend, new_k=new, new_v=new)
    assert out.shape == (0, 2, 32)


def small_call(**change):
    pages = torch.zeros(4, 16, 2, 32)
    call = {
        "q": torch.zeros(1, 4, 32),
        "kv": PagedKV(pages, pages.clone()),
        "plan": DecodePlan.build([[0, 3]], [20], [1], 16),
        "new_k": torch.zeros(1, 2, 32),
        "new_v": torch.zeros(1, 2, 32),
    }
    return call | change


def pages_of(*shape, dtype=torch.float32):
    return PagedKV(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 3, 32)}, r"q must be \[Q, Hq, D\].*\(1, 3, 32\)"),
        ({"q": torch.zeros(1, 4, 64)}, r"q must be \[Q, Hq, D\].*\(1, 4, 64\)"),
        ({"q": torch.zeros(2, 4, 32)}, "the plan has 1 query rows, but q 2"),
        ({"kv": pages_of(4, 8, 2, 32)}, "the plan is for pages of 16, but kv has 8"),
        ({"kv": pages_of(3, 16, 2, 32)}, "the plan reads page 3, but kv has 3"),
        ({"kv": pages_of(4, 16, 2, 32, dtype=torch.float16)}, "must share a dtype"),
        ({"new_v": None}, "new_k and new_v come together"),
        ({"new_k": torch.zeros(1, 4, 32)}, r"new_k and new_v must be \(1, 2, 32\), got"),
        ({"scale": 0.0}, r"scale must be a number in \[1e-18, 1e\+18\], got 0"),
        ({"scale": -1.0}, r"scale must be a number in \[1e-18, 1e\+18\], got -1.0"),
        ({"scale": float("nan")}, r"scale must be a number in .*, got nan"),
        ({"scale": float("inf")}, r"scale must be a number in .*, got inf"),
        ({"scale": 1e300}, r"scale must be a number in .*, got 1e\+300"),
        ({"scale": "1"}, "scale must be a number in .*, got '1'"),
        ({"softcap": 0}, r"softcap must be a number in \[1e-18, 1e\+18\], got 0"),
        ({"softcap": -50.0}, "softcap must be a number in .*, got -50.0"),
        ({"softcap": float("nan")}, "softcap must be a number in .*, got nan"),
        ({"softcap": 1e39}, r"softcap must be a number in .*, got 1e\+39"),
        ({"softcap": True}, "softcap must be a number in .*, got True"),
        ({"window": 0}, "window must be an integer of at least 1, or None; got 0"),
        ({"window": 4.0}, "window must be an integer of at least 1, or None; got 4.0"),
        ({"window": True}, "window must be an integer of at least 1, or None; got True"),
        ({"sinks": [0.0] * 4}, "sinks must be a tensor or None, got list"),
        ({"sinks": torch.zeros(2)}, r"sinks must be .* \[Hq\], here \[4\], on cpu; got .* \[2\]"),
        ({"sinks": torch.zeros(4, 1)}, r"sinks must be .*; got torch.float32 \[4, 1\] on cpu"),
        ({"sinks": torch.zeros(4).int()}, r"sinks must be .*; got torch.int32 \[4\] on cpu"),
        ({"sinks": torch.zeros(4, device="meta")}, r"sinks must be .*; got .* on meta"),
        ({"q": torch.zeros(1, 0, 32)}, r"q must be \[Q, Hq, D\].*\(1, 0, 32\)"),
        ({"backend": "metal"}, "no backend 'metal' for trie_decode: triton"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, message):
    trie_decode(**small_call())
    with pytest.raises(ValueError, match=message):
        trie_decode(**small_call(**change))


@pytest.mark.parametrize(
    ("k", "v", "message"),
    [
        (torch.zeros(4, 16, 2, 32), torch.zeros(4, 16, 2, 16), "must both be"),
        (torch.zeros(4, 16, 64), torch.zeros(4, 16, 64), "must both be"),
        (torch.zeros(4, 16, 0, 32), torch.zeros(4, 16, 0, 32), "Hkv and D must be at least 1"),
        (torch.zeros(4, 0, 2, 32), torch.zeros(4, 0, 2, 32), "page_size, Hkv and D must be"),
        (torch.zeros(4, 16, 2, 0), torch.zeros(4, 16, 2, 0), "Hkv and D must be at least 1"),
        (torch.zeros(4, 16, 2, 32), torch.zeros(4, 16, 32, 2).mT, "equal strides"),
        (torch.zeros(4, 16, 2, 32), torch.zeros(4, 16, 2, 32).half(), "share dtype"),
    ],
)
def test_pages_that_do_not_fit_together_are_refused(k, v, message):
    with pytest.raises(ValueError, match=message):
        PagedKV(k, v)


def test_a_backend_that_cannot_run_says_why():
    call = small_call(kv=pages_of(4, 24, 2, 32), plan=DecodePlan.build([[0]], [1], [1], 24))
    with pytest.raises(ValueError, match=r"triton: .*page size 24 is not one of"):
        trie_decode(**call, backend="triton")
    trie_decode(**call, backend="reference")


def test_the_environment_names_the_backend(monkeypatch):
    monkeypatch.setenv("TW_DECODE_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="no backend 'nonsense' for trie_decode"):
        trie_decode(**small_call())
    trie_decode(**small_call(), backend="reference")


@pytest.mark.parametrize(
    ("head_dim", "page_size", "dtype", "name"),
    [
        (128, 16, torch.bfloat16, "triton"),
        (96, 16, torch.bfloat16, "reference"),
        (80, 16, torch.float32, "reference"),
        (128, 4, torch.bfloat16, "reference"),
        (128, 16, torch.float64, "reference"),
    ],
)
def test_on_a_gpu_what_triton_does_not_take_runs_where_no_graph_may_hold_it(
    head_dim, page_size, dtype, name, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("tw_kernels.triton_device._is_installed", lambda: True)
    q: Any = SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype, shape=(1, 4, head_dim))
    kv: Any = SimpleNamespace(page_size=page_size)
    assert choose_backend(q, kv) == name
    assert TRIE_DECODE[name].CAN_BE_CAPTURED is (name == "triton")
