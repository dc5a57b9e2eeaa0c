"""The CUDA decode kernels on a GPU: the definition, every configuration, and CUDA graphs.

The kernels must be built (TW_CUDA=1 python setup.py build_ext --inplace). Races and reads of what
nothing wrote, with the same tests:

    compute-sanitizer --tool memcheck python -m pytest tests/kernels/test_cuda_decode_gpu.py
    compute-sanitizer --tool racecheck python -m pytest tests/kernels/test_cuda_decode_gpu.py
    compute-sanitizer --tool synccheck python -m pytest tests/kernels/test_cuda_decode_gpu.py
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
from tests.kernels.test_decode import unshared_sdpa
from tests.kernels.tries import relative_error
from tw_kernels import PagedKV, PlanSizes, backends, trie_decode
from tw_kernels.decode.costs import Heads, of_device

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_outputs")]

HALF = [torch.bfloat16, torch.float16]
HEADS = [(2, 2), (6, 2), (8, 1), (32, 2)]  # groups of 1, 3, 8 and 16
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def kernels_are_built():
    if reason := backends("trie_decode")["cuda"]:
        pytest.skip(reason)


def run(batch: Batch, inputs: Inputs, **options) -> torch.Tensor:
    plan = batch.plan(device="cuda", **{"num_workers": 66, **options})
    return trie_decode(**inputs.to("cuda").call(), plan=plan, backend="cuda")


def assert_equals_definition(batch: Batch, inputs: Inputs, **options) -> None:
    got = run(batch, inputs, **options)
    want = oracle(batch, inputs.to("cuda"), inputs.q.shape[-1] ** -0.5)
    assert relative_error(got, want) <= TOLERANCE[inputs.q.dtype]


@pytest.mark.parametrize("most_new", [1, 100])
@pytest.mark.parametrize("sequences", [1, 24])
@pytest.mark.parametrize("page_size", [16, 32, 64, 256])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_every_configuration_gives_the_right_answer(
    dtype, head_dim, heads, page_size, sequences, most_new
):
    batch = random_batch(3, sequences, page_size, 500, most_new)
    assert_equals_definition(batch, random_inputs(batch, (*heads, head_dim), dtype))


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("tile_rows", [1, 5, 64])
@pytest.mark.parametrize("seed", range(5))
def test_random_forests_agree_with_the_oracle(seed, tile_rows, share):
    batch = random_batch(seed, 12, 16, 400, 40)
    inputs = random_inputs(batch, (6, 2, 64), torch.bfloat16, seed)
    assert_equals_definition(batch, inputs, tile_rows=tile_rows, share=share)


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_wide_items_and_streaming_ones_share_a_launch(head_dim, page_size):
    # As the plan is cut for the device: 64 threads over a shared prefix, 256 matrix rows a KV head.
    batch = fork_join_batch(prefix=2048, suffix=100, prompts=1, threads=64, page_size=page_size)
    inputs = random_inputs(batch, (32, 8, head_dim), torch.bfloat16)
    costs = of_device(torch.device("cuda"), Heads(32, 8, head_dim))
    assert_equals_definition(batch, inputs, num_workers=None, costs=costs)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_is_no_worse_than_sdpa(dtype, head_dim):
    batch = fork_join_batch(prefix=4096, suffix=100, prompts=2, threads=8, page_size=16)
    inputs = random_inputs(batch, (8, 2, head_dim), dtype)
    inputs = inputs.to("cuda")
    want = oracle(batch, inputs, head_dim**-0.5)
    usual = relative_error(unshared_sdpa(batch, inputs, head_dim**-0.5), want)
    assert relative_error(run(batch, inputs), want) <= 1.5 * usual


def test_new_keys_and_values_go_to_their_slots_and_nowhere_else():
    batch = random_batch(12, sequences=20, page_size=16, longest=300, most_new=60)
    inputs = random_inputs(batch, (4, 2, 64), torch.bfloat16)
    call = inputs.to("cuda")
    trie_decode(**call.call(), plan=batch.plan(device="cuda"), backend="cuda")
    fresh = torch.cat([batch.slots(s)[-n:] for s, n in enumerate(batch.new_tokens)])
    for pages, old, new in (
        (call.kv.k_pages, inputs.kv.k_pages, inputs.new_k),
        (call.kv.v_pages, inputs.kv.v_pages, inputs.new_v),
    ):
        want = old.flatten(0, 1).clone()
        want[fresh] = new
        got = pages.cpu().flatten(0, 1)
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_pages_that_hold_the_new_tokens_already_need_no_writing():
    batch = random_batch(13, sequences=8, page_size=32, longest=200, most_new=30)
    inputs = random_inputs(batch, (4, 2, 64), torch.bfloat16)
    call, plan = inputs.to("cuda"), batch.plan(device="cuda")
    want = trie_decode(**call.call(), plan=plan, backend="cuda")
    assert torch.equal(trie_decode(call.q, call.kv, plan, backend="cuda"), want)


def test_the_same_call_gives_the_same_bits():
    batch = random_batch(14, sequences=40, page_size=16, longest=900, most_new=3)
    inputs = random_inputs(batch, (8, 2, 128), torch.bfloat16)
    want = run(batch, inputs)
    assert all(torch.equal(run(batch, inputs), want) for _ in range(20))


def test_heads_and_pages_may_be_strided_views():
    batch = random_batch(16, sequences=9, page_size=16, longest=200, most_new=2)
    inputs = random_inputs(batch, (4, 2, 64), torch.bfloat16)
    want = run(batch, inputs)
    # As an engine has them: one projection for q, k and v, one pool for all layers.
    q, new_k, new_v = (
        torch.cat([inputs.q, inputs.new_k, inputs.new_v], 1).cuda().split([4, 2, 2], 1)
    )
    pool = torch.stack([inputs.kv.k_pages, inputs.kv.v_pages], 1).repeat(1, 1, 2, 1, 1).cuda()
    kv = PagedKV(pool[:, 0, :16], pool[:, 1, :16])
    plan = batch.plan(device="cuda", num_workers=66)
    got = trie_decode(q, kv, plan, backend="cuda", new_k=new_k, new_v=new_v)
    assert torch.equal(got, want)


def test_rows_off_16_bytes_are_copied():
    batch = random_batch(17, sequences=4, page_size=16, longest=90, most_new=2)
    inputs = random_inputs(batch, (4, 2, 64), torch.bfloat16)
    want = run(batch, inputs)
    moved = [
        torch.nn.functional.pad(x, (1, 0))[..., 1:] for x in (inputs.q, inputs.new_k, inputs.new_v)
    ]
    assert all(x.stride(1) % 8 for x in moved)
    call = Inputs(moved[0], inputs.kv, *moved[1:]).to("cuda")
    plan = batch.plan(device="cuda", num_workers=66)
    assert torch.equal(trie_decode(**call.call(), plan=plan, backend="cuda"), want)


def test_a_captured_step_replays_on_plans_copied_into_its_own():
    room = PlanSizes(rows=96, pages=4096, items=600, slots=3000)
    batches = [random_batch(seed, 32, 16, 500, 3) for seed in range(4)]
    num_pages = max(b.num_pages for b in batches)
    half = {"dtype": torch.bfloat16, "device": "cuda"}
    kv = PagedKV(*(torch.zeros(num_pages, 16, 2, 64, **half) for _ in range(2)))
    q = torch.zeros(96, 8, 64, **half)
    new_k, new_v = torch.zeros(2, 96, 2, 64, **half)
    static = batches[0].plan(device="cuda", capacity=room)
    call = {"q": q, "kv": kv, "plan": static, "new_k": new_k, "new_v": new_v, "backend": "cuda"}
    trie_decode(**call)  # loads the kernels outside the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = trie_decode(**call)
    for batch in batches:
        inputs = random_inputs(batch, (8, 2, 64), torch.bfloat16).to("cuda")
        rows = batch.num_rows
        for static_tensor, x in ((q, inputs.q), (new_k, inputs.new_k), (new_v, inputs.new_v)):
            static_tensor[:rows] = x
        for static_pages, x in ((kv.k_pages, inputs.kv.k_pages), (kv.v_pages, inputs.kv.v_pages)):
            static_pages[: batch.num_pages] = x
        static.copy_(batch.plan(device="cuda", capacity=room))
        graph.replay()
        want = oracle(batch, inputs, 64**-0.5)
        assert relative_error(out[:rows], want) <= TOLERANCE[torch.bfloat16]
        assert (out[rows:] == 0).all()


def test_an_empty_batch_gives_an_empty_output():
    batch = Batch([], [], [], 16, 1)
    kv = PagedKV(
        *(torch.zeros(1, 16, 1, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    )
    q = torch.zeros(0, 2, 64, dtype=torch.bfloat16, device="cuda")
    assert trie_decode(q, kv, batch.plan(device="cuda"), backend="cuda").shape == (0, 2, 64)
