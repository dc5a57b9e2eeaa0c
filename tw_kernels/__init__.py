"""Kernels for token tries: attention over a trie in training, fused decoding of its branches."""

from tw_kernels.attention import trie_attention
from tw_kernels.backends import backends
from tw_kernels.decode import DecodePlan, PagedKV, PlanSizes, trie_decode
from tw_kernels.trie import BlockSchedule, Trie, TrieBuilder, TrieLayout

__all__ = [
    "BlockSchedule",
    "DecodePlan",
    "PagedKV",
    "PlanSizes",
    "Trie",
    "TrieBuilder",
    "TrieLayout",
    "backends",
    "trie_attention",
    "trie_decode",
]
