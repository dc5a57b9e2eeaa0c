"""Stand-ins of packages that this machine lacks: they compute what the package would and check
their arguments."""

import itertools

import torch
import torch.nn.functional as F


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
        (before, after), offset = window_size, len(k) - (end - first)
        seen = torch.ones(end - first, len(k), dtype=torch.bool)
        seen = seen.tril(offset + after) if after >= 0 else seen
        seen = seen.triu(offset - before) if before >= 0 else seen
        q, k, v = (x.transpose(0, 1)[None] for x in (query[first:end], k, v))
        out = F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=enable_gqa)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


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
