"""Attention over a trie: the op, and a module for each backend."""

from tw_kernels.attention.op import trie_attention

__all__ = ["trie_attention"]
