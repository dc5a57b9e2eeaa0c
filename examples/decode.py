"""One decoding step of three sequences that share their first 32 tokens: two pages, read once."""

import torch

from tw_kernels import DecodePlan, PagedKV, trie_decode

page_size, heads, kv_heads, head_dim = 16, 8, 2, 64
k_pages, v_pages = torch.randn(2, 5, page_size, kv_heads, head_dim)  # 5 pages
kv = PagedKV(k_pages, v_pages)

tables = [[0, 1, 2], [0, 1, 3], [0, 1, 4]]  # the pages of each sequence
lengths = [40, 37, 33]  # with the new token
plan = DecodePlan.build(tables, lengths, new_tokens=[1, 1, 1], page_size=page_size)

q = torch.randn(3, heads, head_dim)
new_k, new_v = torch.randn(2, 3, kv_heads, head_dim)  # written to the pages first
out = trie_decode(q, kv, plan, new_k=new_k, new_v=new_v)

alone = DecodePlan.build(tables[:1], lengths[:1], new_tokens=[1], page_size=page_size)
torch.testing.assert_close(out[:1], trie_decode(q[:1], kv, alone))
print(f"out {tuple(out.shape)}; {plan.size.pages} pages read for {sum(map(len, tables))} in tables")
