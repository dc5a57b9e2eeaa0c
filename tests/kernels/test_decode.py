"""trie_decode on every backend that runs here, against a float64 oracle on random forests."""

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
from tests.kernels.tries import relative_error
from tw_kernels import DecodePlan, PagedKV, PlanSizes, backends, trie_decode
from tw_kernels.decode.op import TRIE_DECODE

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
    return TRIE_DECODE[backend].why_not(inputs.q.to(DEVICE), on_device, **variant or {}) is None


def unshared_sdpa(batch: Batch, inputs: Inputs, scale: float) -> torch.Tensor:
    """PyTorch's attention, one sequence at a time over its own keys: the error to measure by."""
    inputs = inputs.copy()
    pages = [x.flatten(0, 1) for x in (inputs.kv.k_pages, inputs.kv.v_pages)]
    outs, first = [], 0
    for s, new in enumerate(batch.new_tokens):
        slots, rows = batch.slots(s), slice(first, first + new)
        for x, fresh in zip(pages, (inputs.new_k, inputs.new_v), strict=True):
            x[slots[-new:]] = fresh[rows]
        k, v = (x[slots].transpose(0, 1)[None] for x in pages)
        visible = torch.arange(len(slots)) <= torch.tensor(batch.positions(s))[:, None]
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
