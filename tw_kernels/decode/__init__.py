"""Attention of new tokens to shared pages of keys and values: the op, its data, its backends."""

from tw_kernels.decode.op import trie_decode
from tw_kernels.decode.plan import DecodePlan, PagedKV, PlanSizes

__all__ = ["DecodePlan", "PagedKV", "PlanSizes", "trie_decode"]
