"""What only a GPU shows of the Triton decode kernels: every configuration, and CUDA graphs."""

import pytest
import torch

from tests.kernels.decode_batches import oracle, random_batch, random_inputs
from tests.kernels.tries import relative_error
from tw_kernels import PagedKV, PlanSizes, trie_decode

pytestmark = pytest.mark.gpu
pytest.importorskip("triton")


VARIANT = {"window": 90, "softcap": 2.0, "sinks": torch.linspace(-3, 4, 8)}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}


def on_device(variant: dict) -> dict:
    return {n: x.cuda() if isinstance(x, torch.Tensor) else x for n, x in variant.items()}


@pytest.mark.parametrize("most_new", [1, 100])
@pytest.mark.parametrize("sequences", [1, 60])
@pytest.mark.parametrize("page_size", [8, 16, 64, 256])
@pytest.mark.parametrize("head_dim", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_configuration_gives_the_right_answer(
    dtype, head_dim, page_size, sequences, most_new
):
    batch = random_batch(3, sequences, page_size, 700, most_new)
    inputs = random_inputs(batch, (8, 2, head_dim), dtype).to("cuda")
    want = oracle(batch, inputs, head_dim**-0.5)
    got = trie_decode(**inputs.copy().call(), plan=batch.plan(device="cuda", num_workers=66))
    assert relative_error(got, want) <= TOLERANCE[dtype]


@pytest.mark.parametrize("most_new", [1, 100])
@pytest.mark.parametrize("page_size", [8, 64])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_configuration_has_windows_soft_caps_and_sinks(dtype, head_dim, page_size, most_new):
    batch = random_batch(3, 40, page_size, 700, most_new)
    inputs = random_inputs(batch, (8, 2, head_dim), dtype).to("cuda")
    plan = batch.plan(device="cuda", num_workers=66)
    for names in (("window",), ("softcap",), ("sinks",), tuple(VARIANT)):
        variant = on_device({name: VARIANT[name] for name in names})
        want = oracle(batch, inputs, head_dim**-0.5, **variant)
        got = trie_decode(**inputs.copy().call(), plan=plan, **variant)
        assert relative_error(got, want) <= TOLERANCE[dtype]


@pytest.mark.parametrize("variant", [{}, VARIANT], ids=["plain", "window, softcap, sinks"])
def test_a_captured_step_replays_on_plans_copied_into_its_own(variant):
    room = PlanSizes(rows=96, pages=4096, items=600, slots=3000)
    batches = [random_batch(seed, 32, 16, 500, 3) for seed in range(4)]
    num_pages = max(b.num_pages for b in batches)
    shape = num_pages, 16, 2, 64
    kv = PagedKV(torch.empty(shape, device="cuda"), torch.empty(shape, device="cuda"))
    q = torch.zeros(96, 8, 64, device="cuda")
    new_k, new_v = torch.zeros(2, 96, 2, 64, device="cuda")
    static = batches[0].plan(device="cuda", capacity=room)
    call = {"q": q, "kv": kv, "plan": static, "new_k": new_k, "new_v": new_v}
    variant = on_device(variant)
    call |= variant
    trie_decode(**call)  # compiles outside the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = trie_decode(**call)
    for batch in batches:
        inputs = random_inputs(batch, (8, 2, 64), torch.float32).to("cuda")
        rows = batch.num_rows
        for static_tensor, x in ((q, inputs.q), (new_k, inputs.new_k), (new_v, inputs.new_v)):
            static_tensor[:rows] = x
        for static_pages, x in ((kv.k_pages, inputs.kv.k_pages), (kv.v_pages, inputs.kv.v_pages)):
            static_pages[: batch.num_pages] = x
        static.copy_(batch.plan(device="cuda", capacity=room))
        graph.replay()
        want = oracle(batch, inputs, 64**-0.5, **variant)
        assert relative_error(out[:rows], want) <= 1e-5
        assert (out[rows:] == 0).all()
