"""bench.attention: its --quick form, its reference and check, and its peers, some as stand-ins."""

import functools
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, varlen
from torch.nn.attention.flex_attention import flex_attention

from bench import attention, masks, shapes
from bench import attention_peers as peers
from bench.attention_setup import OURS, AttentionSetup, Pass, Problem
from bench.masks import visible
from bench.oracle import TOLERANCE, reference, worst_row
from bench.running import suite_main
from bench.suite import Skip
from tests.bench.schema import ONCE, checked_rows
from tests.bench.stand_ins import Flash, varlen_attn
from tw_kernels.attention import dense

CASES = [shapes.trajectory(200, 2), shapes.pack(3, 40)]


def _attention(
    case=CASES[0], dtype=torch.bfloat16, what: Pass = "fwd+bwd", heads=4, kv_heads=2, window=None
):
    problem = Problem(case, "cpu", heads, kv_heads, 32, window)
    return AttentionSetup(problem, dtype, what)


def test_bench_attention_quick(tmp_path):
    path = tmp_path / "a.json"
    arguments = [*ONCE, "--only", "dtype=float32", "--json", str(path)]
    assert suite_main(attention.SUITE, arguments) == 0
    rows = checked_rows(path, attention.SUITE)
    for row in rows:
        if row["peer"] in (OURS, peers.DENSE, peers.CAUSAL, peers.UNROLLED_SDPA):
            assert row["status"] == "ok" and row["tflops"] > 0 and row["gb_per_s"] > 0
            assert row["of_causal"] > 0 and row["roofline"] > 0 and len(row["checked_heads"]) == 4
        if row["peer"] == OURS:
            assert row["backend"] in attention.TRIE_ATTENTION
        if row["peer"].startswith("Flex") and row["pass"] == "fwd+bwd":
            assert row["reason"] == "FlexAttention has no backward on a CPU"


@pytest.mark.parametrize("wrong", ["neighbour", "head", "nan"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_attention_check_catches_one_wrong_column_head_or_value(wrong, dtype):
    setup = _attention(shapes.trajectory(300, 2), dtype)
    q, k, v, dout = setup.inputs(0)
    mask = visible(setup.layout.subtree_ends)
    if wrong == "neighbour":  # one row sees one column that it should not
        row = 200
        mask[row, (~mask[row, :row]).nonzero()[0]] = True

    def attend(q, k, v):
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, enable_gqa=True
        )
        return out[0].transpose(0, 1)

    out, *grads = setup.run(attend, q, k, v, dout)
    if wrong == "head":
        out = out[:, [1, 0, 2, 3]]
    if wrong == "nan":
        out = out.clone()
        out[250, 3, 7] = float("nan")
    assert "off by" in (setup.check("planted", (out, *grads), 0) or "")


def test_the_reference_agrees_with_the_dense_backend_in_float64():
    setup = _attention(shapes.trajectory(1200, 3))  # more than two chunks, a ragged last one
    values = setup.problem.values[0]
    expected = reference(*values, setup.layout.subtree_ends, [0, 1])
    q, k, v, dout = (x.double() for x in values)
    plan = dense.plan(setup.layout, q)
    out, lse = dense.forward(q, k, v, plan, 32**-0.5)
    grads = dense.backward(dout, q, k, v, out, lse, plan, 32**-0.5)
    for got, name in zip((out, *grads), ("out", "dq", "dk", "dv"), strict=True):
        assert worst_row(got, getattr(expected, name)) < 1e-11, name
    assert TOLERANCE[torch.float32] < TOLERANCE[torch.bfloat16]


def test_attention_work_is_of_visible_pairs_and_of_each_tensor_once():
    setup = _attention(what="fwd")
    pairs = int(visible(setup.layout.subtree_ends).sum())
    q, k, v, dout = setup.inputs(0)
    forward = setup.work(OURS)
    assert forward.flops == 4 * pairs * 4 * 32 and forward.dtype == "bfloat16"
    assert forward.bytes == sum(x.nbytes for x in (q, k, v, q))
    both, backward = _attention().work(OURS), _attention(what="bwd").work(OURS)
    assert both.flops == 14 * pairs * 4 * 32 and backward.flops == 10 * pairs * 4 * 32
    assert both.bytes == backward.bytes == sum(x.nbytes for x in (q, k, v, q, dout, q, k, v))
    # Whoever computes more is credited with no more, but causal attention answers another question.
    assert setup.work(peers.UNROLLED_SDPA) == setup.work(peers.DENSE) == forward
    n = setup.layout.num_tokens
    assert setup.work(peers.CAUSAL).flops == 4 * n * (n + 1) // 2 * 4 * 32


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("name", peers.FLASH_PACKAGES)
def test_a_flash_package_is_called_causal_on_batch_by_token_by_head(name, with_lse, monkeypatch):
    package, flash = peers.FLASH_PACKAGES[name], Flash(with_lse)
    stand_in = SimpleNamespace(flash_attn_func=flash)
    parent = package.module.partition(".")[0]
    monkeypatch.setitem(sys.modules, parent, stand_in)
    monkeypatch.setitem(sys.modules, package.module, stand_in)
    setup = _attention(what="fwd+bwd" if package.backward else "fwd")
    call = peers._package_causal(setup, package)
    assert setup.check(name, call(0), 0) is None
    n = setup.layout.num_tokens
    assert flash.calls == [((1, n, 4, 32), (1, n, 2, 32), True)]
    with pytest.raises(Skip, match="half precision"):
        peers._package_causal(_attention(dtype=torch.float32), package)
    if not package.backward:
        with pytest.raises(Skip, match="no backward"):
            peers._package_causal(_attention(), package)


def test_an_absent_package_says_what_is_missing(monkeypatch):
    package = peers.FLASH_PACKAGES["FlashAttention 3 forward, causal"]
    why = functools.partial(peers._why_no_package, package)
    assert why("cpu") == "runs on CUDA only"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert why("cuda") == "does not run on compute capability 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert why("cuda") == "fa3-fwd is not installed"
    monkeypatch.setitem(sys.modules, package.module, SimpleNamespace())
    assert why("cuda") == "fa3-fwd is not installed"
    monkeypatch.setitem(sys.modules, package.module, SimpleNamespace(flash_attn_func=Flash(False)))
    assert why("cuda") is None


def test_dense_math_says_how_many_scores_it_would_write():
    heads = peers.MOST_SCORE_BYTES // (4 * 200 * 200) + 1
    with pytest.raises(Skip, match="writes 9 GB of scores"):
        peers._dense(_attention(heads=heads, kv_heads=heads), SDPBackend.MATH)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_unrolled_varlen_maps_back_to_every_token_of_the_trie(case, monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    setup = _attention(case)
    assert set(setup.problem.unrolled_nodes.tolist()) == set(range(setup.layout.num_tokens))
    result = peers._unrolled_varlen(setup)(0)
    assert len(result[0]) == case.unrolled
    assert setup.check(peers.UNROLLED_VARLEN, result, 0) is None
    with pytest.raises(Skip, match="half precision"):
        peers._unrolled_varlen(_attention(dtype=torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_unrolled_sdpa_has_the_outputs_and_gradients_of_the_trie(case, dtype):
    setup = _attention(case, dtype)
    assert setup.check(peers.UNROLLED_SDPA, peers._unrolled_sdpa(setup)(0), 0) is None


@pytest.mark.parametrize("wrong", ["second copy", "gradient of a copy", "order of paths"])
def test_the_unrolled_check_catches_one_wrong_copy(wrong):
    setup = _attention(dtype=torch.float32)
    paths = peers._unrolled_sdpa(setup)(0)
    out, _, dk, _ = paths[1]
    if wrong == "second copy":  # token 3 of the second path is on the first path too
        out[0, :, 3] *= 1.01
    if wrong == "gradient of a copy":
        dk[0, :, 3] *= 0.9
    if wrong == "order of paths":
        paths[0], paths[2] = paths[2], paths[0]
    assert "off by" in (setup.check(peers.UNROLLED_SDPA, paths, 0) or "")


@pytest.mark.parametrize("window", [2, 64, 10**6])
def test_a_window_hides_the_same_ancestors_from_every_peer_and_the_reference(window, monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    setup = _attention(window=window)
    depth = setup.problem.case.trie.positions
    mask = visible(setup.layout.subtree_ends, setup.problem.starts)
    by_depth = visible(setup.layout.subtree_ends) & (depth[:, None] - depth < window)
    assert torch.equal(mask, by_depth)
    assert setup.problem.visible_pairs == int(mask.sum()) and setup.key["window"] == window
    in_paths = sum(
        int(visible(torch.full((len(n),), len(n))).sum())
        if window > len(n)
        else sum(min(i + 1, window) for i in range(len(n)))
        for n in setup.problem.path_nodes
    )
    assert setup.problem.unrolled_pairs == in_paths
    for name, prepare in (
        (OURS, functools.partial(attention._prepare, backend=None)),
        (peers.DENSE, functools.partial(peers._dense, kernel=None)),
        (peers.UNROLLED_VARLEN, peers._unrolled_varlen),
    ):
        assert setup.check(name, prepare(setup)(0), 0) is None, name
    for prepare in (peers._causal, peers._unrolled_sdpa):
        with pytest.raises(Skip, match="no window"):
            prepare(setup)


def test_the_check_sees_a_window_that_is_one_token_too_wide():
    setup, wider = _attention(window=30), _attention(window=31)
    result = attention._prepare(wider, None)(0)
    assert "off by" in (setup.check("planted", result, 0) or "")


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("n", [64, 130])
def test_a_bitmap_holds_one_bit_a_visible_pair(n, window):
    setup = _attention(shapes.star(n, threads=4), window=window)
    ends, starts = setup.layout.subtree_ends, setup.problem.starts
    bits = masks.bitmap(ends, starts)
    assert bits.shape == (n, -(-n // 64)) and bits.dtype == torch.int64
    at = torch.arange(n)
    zero = torch.tensor(0)
    for mask_mod in (masks.bitmap_mask_mod(bits), masks.ancestor_mask_mod(ends, starts)):
        got = mask_mod(zero, zero, at[:, None].expand(n, n), at.expand(n, n))
        assert torch.equal(got, visible(ends, starts))


@pytest.mark.parametrize("kind", ["ancestors", "bitmap"])
def test_flex_attention_takes_the_mask_and_the_backend_that_a_peer_names(kind, monkeypatch):
    given = {}

    def flex(q, k, v, **options):
        given.update(options)
        return flex_attention(q, k, v, block_mask=options["block_mask"], enable_gqa=True)

    monkeypatch.setattr(peers, "_compiled", lambda setup: flex)
    monkeypatch.setattr(peers, "FLEX_FEWEST_TOKENS", 1)
    setup = _attention(what="fwd", window=40)
    result = peers._flex(setup, kind=kind, backend="FLASH")(0)
    assert setup.check(peers.FLEX_BITMAP, result, 0) is None
    assert given["kernel_options"] == {"BACKEND": "FLASH"}


def test_the_backward_pass_alone_repeats_on_one_forward_pass():
    setup = _attention(what="bwd", dtype=torch.float32)
    calls = []

    def attend(q, k, v):
        calls.append(1)
        return attention.trie_attention(q, k, v, setup.layout)

    inputs = setup.inputs(0)
    first, second = (setup.run(attend, *inputs) for _ in range(2))
    assert len(calls) == 1 and setup.check(OURS, first, 0) is None
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    setup.run(attend, *setup.inputs(0))  # another peer's
    assert len(calls) == 2


def test_on_cuda_forward_and_backward_have_rows_of_their_own_and_a_chain_for_causal_peers():
    assert attention.PASSES["cuda"] == ("fwd", "bwd")
    [case] = [
        c for c in attention.cases(attention.Options(device="cuda")) if c.name == "chain-8192"
    ]
    assert len(case.paths) == 1 and len(case.trie) == 8192
