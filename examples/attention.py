"""Attention over a trie: two paths of 9 tokens in all share their first three, computed once."""

import torch

from tw_kernels import Trie, trie_attention

trie = Trie.from_paths([[1, 2, 3, 4], [1, 2, 3, 5, 6]])
q = torch.randn(len(trie), 4, 64, requires_grad=True)  # [N, query heads, head dim]
k, v = torch.randn(2, len(trie), 2, 64)  # each [N, KV heads, head dim]
out = trie_attention(q, k, v, trie.layout(q.device))  # a token sees itself and its ancestors
out.sum().backward()
print(f"out {tuple(out.shape)}; path 1 is tokens {trie.path_nodes(1).tolist()} of {len(trie)}")
