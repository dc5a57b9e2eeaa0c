"""The CUDA trie attention kernels on a GPU: the definition, ragged sizes, bits and CUDA graphs.

The kernels must be built (TW_CUDA=1 python setup.py build_ext --inplace). test_attention.py runs
them through every backend's tests as well. Races and reads of what nothing wrote, with the same
tests:

    compute-sanitizer --tool memcheck python -m pytest tests/kernels/test_cuda_attention_gpu.py
    compute-sanitizer --tool racecheck python -m pytest tests/kernels/test_cuda_attention_gpu.py
    compute-sanitizer --tool synccheck python -m pytest tests/kernels/test_cuda_attention_gpu.py
"""

import pytest
import torch
from torch import Tensor

from tests.kernels.cuda_emulation import GRAINS
from tests.kernels.rounding import TENSOR_CORES, allowed, gradient_terms
from tests.kernels.tries import oracle, random_layout, real_trees, relative_error, visible
from tw_kernels import Trie, TrieLayout, backends, trie_attention
from tw_kernels.attention import cuda as cuda_attention

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_outputs")]

TOLERANCE = 8e-3  # of bfloat16
STAR = [[0] * 128 + [t + 1] * 96 for t in range(4)]
RULE = cuda_attention.FINE_COST
HEADS = [(1, 1), (6, 6), (6, 2), (8, 1)]


@pytest.fixture(autouse=True)
def kernels_are_built():
    if reason := backends("trie_attention")["cuda"]:
        pytest.skip(reason)


@pytest.fixture(autouse=True, params=GRAINS)
def grain(request, monkeypatch):
    """Every test runs with both, whatever the rule would choose for its trie."""
    monkeypatch.setattr(cuda_attention, "FINE_COST", GRAINS[request.param])


def inputs(
    n: int,
    heads: tuple[int, int],
    head_dim: int,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> list[Tensor]:
    """q, k, v, dout."""
    generator = torch.Generator().manual_seed(seed)
    counts = (heads[0], heads[1], heads[1], heads[0])
    return [torch.randn(n, h, head_dim, generator=generator).cuda().to(dtype) for h in counts]


def run(layout: TrieLayout, tensors: list[Tensor], backend: str = "cuda") -> list[Tensor]:
    """out, lse, dq, dk, dv."""
    q, k, v = (x.detach().requires_grad_() for x in tensors[:3])
    out, lse = trie_attention(q, k, v, layout, backend=backend, return_lse=True)
    return [out.detach(), lse, *torch.autograd.grad(out, (q, k, v), tensors[3])]


def assert_equals_definition(layout: TrieLayout, tensors: list[Tensor]) -> None:
    got = run(layout, tensors)
    q, k, v = (x.detach().double().requires_grad_() for x in tensors[:3])
    mask = visible(layout.subtree_ends)
    out, lse = oracle(q, k, v, mask, q.shape[2] ** -0.5)
    assert relative_error(got[0], out) <= TOLERANCE
    assert relative_error(got[1], lse) <= TOLERANCE
    grads = torch.autograd.grad(out, (q, k, v), tensors[3].double())
    terms = gradient_terms(tensors, mask, q.shape[2] ** -0.5)
    for a, b, sizes in zip(got[2:], grads, terms, strict=True):
        assert (a.double() - b).norm() <= allowed(TOLERANCE, b, sizes, TENSOR_CORES)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_float16_agrees_with_the_oracle(head_dim):
    layout = on_gpu(random_layout(9, roots=4, branches=12, length=150))
    assert_equals_definition(
        layout, inputs(layout.num_tokens, (6, 2), head_dim, dtype=torch.float16)
    )


@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_pack_of_small_tries_takes_fine_kernels_and_agrees_with_triton(head_dim, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(cuda_attention, "FINE_COST", RULE)
    layout = on_gpu(Trie.pack([Trie.from_paths(STAR)] * 16).layout())
    assert cuda_attention.fine_is_cheaper(layout, (cuda_attention.OWN_ROWS, 128))
    tensors = inputs(layout.num_tokens, (32, 8), head_dim)
    for got, other in zip(run(layout, tensors), run(layout, tensors, "triton"), strict=True):
        assert relative_error(got, other.double()) <= TOLERANCE


def on_gpu(layout: TrieLayout) -> TrieLayout:
    return TrieLayout(layout.subtree_ends.cuda())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_random_forests_agree_with_the_oracle(head_dim, heads, seed):
    layout = on_gpu(random_layout(seed, roots=4, branches=12, length=150))
    assert_equals_definition(layout, inputs(layout.num_tokens, heads, head_dim, seed))


@pytest.mark.parametrize("n", [1, 63, 64, 65, 127, 128, 129, 192, 1000, 4097])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_ragged_last_tiles(head_dim, n):
    layout = TrieLayout(torch.full((n,), n, dtype=torch.int32, device="cuda"))
    assert_equals_definition(layout, inputs(n, (4, 2), head_dim))


@pytest.mark.parametrize("task", sorted(real_trees(0.01))[::4])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_real_trees(head_dim, task):
    layout = on_gpu(real_trees(0.1)[task].layout())
    assert_equals_definition(layout, inputs(layout.num_tokens, (2, 1), head_dim))


def test_rows_that_see_nothing_of_their_first_tiles():
    layout = on_gpu(Trie.pack([Trie.from_paths([list(range(n))]) for n in (100, 1, 300)]).layout())
    assert_equals_definition(layout, inputs(401, (2, 1), 64))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_more_tiles_than_multiprocessors(head_dim):
    layout = on_gpu(random_layout(5, roots=4, branches=12, length=200))
    assert_equals_definition(layout, inputs(layout.num_tokens, (16, 8), head_dim))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_same_call_gives_the_same_bits(head_dim):
    layout = on_gpu(random_layout(6, roots=4, branches=20, length=300))
    tensors = inputs(layout.num_tokens, (8, 2), head_dim)
    want = run(layout, tensors)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(run(layout, tensors), want, strict=True))


def test_a_thread_changes_no_bit_of_its_siblings():
    prefix, threads = 210, (180, 250, 160)  # no bound falls on a block's
    paths = [[0] * prefix + [t + 1] * n for t, n in enumerate(threads)]
    layout = on_gpu(Trie.from_paths(paths).layout())
    before = inputs(layout.num_tokens, (2, 1), 64)
    changed = slice(prefix + threads[0], prefix + sum(threads[:2]))
    after = [x.clone() for x in before]
    for x in after:
        x[changed] = 50 * torch.randn_like(x[changed])
    runs = list(zip(run(layout, before), run(layout, after), strict=True))
    runs[1] = runs[1][0].T, runs[1][1].T  # lse: tokens first, like the others
    for x, y in runs:
        assert not torch.equal(x[changed], y[changed])
        assert torch.equal(x[changed.stop :], y[changed.stop :])
        assert torch.equal(x[prefix : changed.start], y[prefix : changed.start])
    for x, y in runs[:3]:  # out, lse, dq; the prefix's dk and dv do gather from every thread
        assert torch.equal(x[:prefix], y[:prefix])


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
        lambda x: torch.nn.functional.pad(x, (1, 0))[..., 1:],
    ],
)
def test_strides_do_not_matter(view):
    layout = on_gpu(random_layout(7, length=100))
    tensors = inputs(layout.num_tokens, (4, 2), 64)
    want = run(layout, tensors)
    got = run(layout, [view(x) for x in tensors])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_captured_forward_and_backward_replays_on_other_numbers():
    layout = on_gpu(random_layout(8, length=150))
    q, k, v, dout = inputs(layout.num_tokens, (4, 2), 128)
    for x in (q, k, v):
        x.requires_grad_()

    def step() -> list[Tensor]:
        out = trie_attention(q, k, v, layout, backend="cuda")
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]

    side = torch.cuda.Stream()  # loads the kernels and builds the plan outside the capture
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        fresh = inputs(layout.num_tokens, (4, 2), 128, seed)
        with torch.no_grad():
            for static, x in zip((q, k, v, dout), fresh, strict=True):
                static.copy_(x)
        graph.replay()
        out, _, *grads = run(layout, fresh)
        assert all(torch.equal(a, b) for a, b in zip(captured, [out, *grads], strict=True))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_long_trie_agrees_with_triton(head_dim):
    pytest.importorskip("triton")
    from tw_kernels.attention.triton.tuning import fork_join_subtree_ends

    layout = TrieLayout(fork_join_subtree_ends().cuda())
    tensors = inputs(layout.num_tokens, (16, 4), head_dim)
    pairs = zip(run(layout, tensors), run(layout, tensors, "triton"), strict=True)
    for got, other in pairs:
        assert relative_error(got, other.double()) <= TOLERANCE
