"""Peers that this machine lacks, through stand-ins of their packages that answer as they would, and
say what they were called with; and what the checks make of unrolled results."""

import functools
import itertools
import sys
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch.nn.attention import SDPBackend, varlen

from bench import attention_setup, decode, peers, shapes
from bench.frame import Skip

CASES = [shapes.trajectory(200, 2), shapes.pack(3, 40)]
TREE = shapes.tree_of_thoughts("sorting128ToT", 17)


def _attention(case=CASES[0], dtype=torch.bfloat16, backward=True, heads=4, kv_heads=2):
    problem = attention_setup.Problem(case, "cpu", heads, kv_heads, 32)
    return attention_setup.AttentionSetup(problem, dtype, backward)


def _decode(case, heads=4, kv_heads=2):
    return decode.DecodeSetup(decode.Problem(case, "cpu", (heads, kv_heads, 32)), torch.bfloat16)


class Flash:
    """A flash_attn_func of [B, N, H, D], which remembers its arguments."""

    def __init__(self, with_lse):
        self.with_lse, self.calls = with_lse, []

    def __call__(self, q, k, v, causal=False):
        self.calls.append((q.shape, k.shape, causal))
        assert q.is_contiguous() and k.is_contiguous() and v.is_contiguous()
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        out = out.transpose(1, 2)
        return (out, out[..., 0]) if self.with_lse else out


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
    assert decode._why_no_cascade("cuda") == "flashinfer-python is not installed"


def test_dense_math_says_how_many_scores_it_would_write():
    heads = peers.MOST_SCORE_BYTES // (4 * 200 * 200) + 1
    with pytest.raises(Skip, match="writes 9 GB of scores"):
        peers._dense(_attention(heads=heads, kv_heads=heads), SDPBackend.MATH)


def test_a_package_built_for_another_torch_says_so(tmp_path, monkeypatch):
    (tmp_path / "broken_flash.py").write_text("raise OSError('undefined symbol: x\\nmore')\n")
    monkeypatch.syspath_prepend(tmp_path)
    why = peers.why_not_importable("broken_flash", "f", "broken-flash")
    assert why == "broken-flash cannot be imported: undefined symbol: x"


def test_a_function_of_an_older_torch_says_which_parameter_it_lacks(monkeypatch):
    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
        raise AssertionError

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    torch_ = f"of torch {torch.__version__} takes no"
    assert peers._why_no_varlen("cuda") == f"varlen_attn {torch_} window_size"
    assert decode._why_no_varlen("cuda") == f"varlen_attn {torch_} block_table"
    assert peers._why_no_varlen("cpu") == decode._why_no_varlen("cpu") == "runs on CUDA only"


def varlen_attn(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
):
    """As PyTorch documents it: sequences side by side, or keys and values in pages."""
    assert cu_seq_q.dtype == torch.int32 and max_q == cu_seq_q.diff().max()
    outs = []
    for s, (first, end) in enumerate(itertools.pairwise(cu_seq_q.tolist())):
        if block_table is None:
            k, v = (x[cu_seq_k[s] : cu_seq_k[s + 1]] for x in (key, value))
        else:
            assert cu_seq_k is None and seqused_k is not None
            assert seqused_k.dtype == block_table.dtype == torch.int32
            k, v = (x[block_table[s].long()].flatten(0, 1)[: seqused_k[s]] for x in (key, value))
        assert len(k) <= max_k
        q, k, v = (x.transpose(0, 1)[None] for x in (query[first:end], k, v))
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=window_size == (-1, 0), enable_gqa=enable_gqa
        )
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


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


@pytest.mark.parametrize("case", [shapes.fork(2, 3, 300, 20), TREE], ids=lambda case: case.name)
def test_paged_varlen_reads_each_sequences_own_pages(case, monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    setup = _decode(case)
    assert setup.check(decode.VARLEN, decode._varlen(setup)(0), 0) is None


class Cascade:
    """FlashInfer's MultiLevelCascadeAttentionWrapper: partial attention on each level, of groups of
    queries over their pages, merged by log-sum-exp."""

    def __init__(self, num_levels, float_workspace_buffer, kv_layout):
        assert kv_layout == "NHD" and float_workspace_buffer.dtype == torch.uint8
        self.num_levels = num_levels

    def plan(
        self,
        qo_indptr_arr,
        paged_kv_indptr_arr,
        paged_kv_indices_arr,
        paged_kv_last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim,
        page_size,
        q_data_type,
        kv_data_type,
    ):
        arrays = qo_indptr_arr, paged_kv_indptr_arr, paged_kv_indices_arr, paged_kv_last_page_len
        assert all(len(array) == self.num_levels for array in arrays)
        assert all(x.dtype == torch.int32 for array in arrays for x in array)
        self.levels = [[x.tolist() for x in level] for level in zip(*arrays, strict=True)]
        self.group, self.page_size = num_qo_heads // num_kv_heads, page_size
        self.types = q_data_type, kv_data_type

    def run(self, q, paged_kv_cache):
        k_pages, v_pages = (x.double().flatten(0, 1) for x in paged_kv_cache)
        assert self.types == (q.dtype, paged_kv_cache[0].dtype)
        out = torch.zeros_like(q, dtype=torch.float64)
        lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float64)
        for queries, indptr, pages, last in self.levels:
            assert queries[0] == 0 and queries[-1] == len(q)
            assert len(queries) == len(indptr) == len(last) + 1
            for g in range(len(last)):
                own = pages[indptr[g] : indptr[g + 1]]
                if not own:
                    continue
                slots = [p * self.page_size + i for p in own for i in range(self.page_size)]
                slots = slots[: (len(own) - 1) * self.page_size + last[g]]
                k, v = (x[slots].repeat_interleave(self.group, 1) for x in (k_pages, v_pages))
                rows = slice(queries[g], queries[g + 1])
                scores = torch.einsum("qhd,khd->qhk", q[rows].double(), k) * q.shape[-1] ** -0.5
                part = torch.einsum("qhk,khd->qhd", scores.softmax(-1), v)
                new = scores.logsumexp(-1)
                total = torch.logaddexp(lse[rows], new)
                old_share, share = (x.sub(total).exp()[..., None] for x in (lse[rows], new))
                out[rows] = out[rows] * old_share + part * share
                lse[rows] = total
        return out.to(q.dtype)


@pytest.mark.parametrize(
    "case",
    [shapes.fork(2, 3, 300, 20), shapes.fork(1, 1, 40, 5), TREE],
    ids=lambda case: case.name,
)
def test_the_cascade_plan_computes_each_sequences_attention(case, monkeypatch):
    stand_in = SimpleNamespace(MultiLevelCascadeAttentionWrapper=Cascade)
    monkeypatch.setitem(sys.modules, "flashinfer", stand_in)
    assert decode._why_no_cascade("cuda") is None
    setup = _decode(case)
    assert setup.check(decode.CASCADE, decode._cascade(setup)(0), 0) is None


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=12), min_size=1, max_size=9),
    st.integers(1, 4),
)
def test_a_cascade_reads_each_page_once_and_gives_each_sequence_all_of_its_own(texts, page_size):
    # A live sequence ends in a new token of its own.
    paths = [[*text, 100 + i] for i, text in enumerate(texts)]
    problem = decode.Problem(shapes.Case("random", lambda: paths), "cpu", (1, 1, 8))
    paging = problem.paging(page_size)
    levels = decode.cascade(paging, problem.lengths)
    read = [page for groups in levels for group in groups for page in group.pages]
    assert sorted(read) == list(range(paging.num_pages))
    tables, tokens = ([[] for _ in paths], [0] * len(paths))
    for groups in levels:
        ends = [0, *(group.end for group in groups)]
        assert [group.first for group in groups] == ends[:-1] and ends[-1] == len(paths)
        for group in groups:
            for s in range(group.first, group.end):
                tables[s] += group.pages
                tokens[s] += max(0, len(group.pages) - 1) * page_size + group.last_len
    assert tables == [table.tolist() for table in paging.tables]
    assert tokens == problem.lengths


def test_attention_work_is_of_visible_pairs_and_of_each_tensor_once():
    setup = _attention(backward=False)
    pairs = int(peers.visible(setup.layout.subtree_ends).sum())
    q, k, v, dout = setup.inputs(0)
    forward = setup.work(attention_setup.OURS)
    assert forward.flops == 4 * pairs * 4 * 32 and forward.dtype == "bfloat16"
    assert forward.bytes == sum(x.nbytes for x in (q, k, v, q))
    both = _attention(backward=True).work(attention_setup.OURS)
    assert both.flops == 14 * pairs * 4 * 32
    assert both.bytes == sum(x.nbytes for x in (q, k, v, q, dout, q, k, v))
    # Whoever computes more is credited with no more, but causal attention answers another question.
    assert setup.work(peers.UNROLLED_SDPA) == setup.work(peers.DENSE) == forward
    n = setup.layout.num_tokens
    assert setup.work(peers.CAUSAL).flops == 4 * n * (n + 1) // 2 * 4 * 32


def test_decode_work_is_of_every_pair_and_of_each_key_and_value_once():
    setup = _decode(shapes.fork(2, 3, 300, 20))
    q, k, v = setup.inputs(0)
    work = setup.work(decode.OURS)
    assert work.flops == 4 * 6 * 320 * 4 * 32 and len(k) == 300 + 6 * 20
    assert work.bytes == sum(x.nbytes for x in (q, k, v, q))
