"""bench.attention: its --quick form, its reference and check, and its peers, some as stand-ins."""

import functools
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, varlen

from bench import attention, shapes
from bench import attention_peers as peers
from bench.attention_setup import OURS, AttentionSetup, Problem
from bench.masks import visible
from bench.oracle import TOLERANCE, reference, worst_row
from bench.running import suite_main
from bench.suite import Skip
from tests.bench.schema import ONCE, checked_rows
from tests.bench.stand_ins import Flash, varlen_attn
from tw_kernels.attention import dense

CASES = [shapes.trajectory(200, 2), shapes.pack(3, 40)]


def _attention(case=CASES[0], dtype=torch.bfloat16, backward=True, heads=4, kv_heads=2):
    problem = Problem(case, "cpu", heads, kv_heads, 32)
    return AttentionSetup(problem, dtype, backward)


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
    setup = _attention(backward=False)
    pairs = int(visible(setup.layout.subtree_ends).sum())
    q, k, v, dout = setup.inputs(0)
    forward = setup.work(OURS)
    assert forward.flops == 4 * pairs * 4 * 32 and forward.dtype == "bfloat16"
    assert forward.bytes == sum(x.nbytes for x in (q, k, v, q))
    both = _attention(backward=True).work(OURS)
    assert both.flops == 14 * pairs * 4 * 32
    assert both.bytes == sum(x.nbytes for x in (q, k, v, q, dout, q, k, v))
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
    setup = _attention(backward=package.backward)
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
