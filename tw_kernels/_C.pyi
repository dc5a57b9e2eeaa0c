from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

class TrieBuilder:
    def __init__(self, columns: Sequence[str]) -> None: ...
    def add(self, paths: Sequence[Any], columns: Sequence[Sequence[Any]]) -> None: ...
    def shared_prefix(self, path: Any) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    def build(
        self,
    ) -> tuple[
        NDArray[np.int64],  # tokens
        NDArray[np.int64],  # positions
        NDArray[np.int64],  # parents
        NDArray[np.int32],  # subtree_ends
        NDArray[np.int32],  # path ends
        list[NDArray[np.float32]],  # columns
    ]: ...

def longest_path(subtree_ends: NDArray[np.int32]) -> int: ...
def window_starts(subtree_ends: NDArray[np.int32], window: int) -> NDArray[np.int32]: ...
def node_segments(subtree_ends: NDArray[np.int32]) -> NDArray[np.int32]: ...
def block_schedule(
    subtree_ends: NDArray[np.int32], block_q: int, block_kv: int, window: int | None = None
) -> tuple[NDArray[np.int32], ...]: ...
def decode_plan(
    page_tables: Any,
    lengths: NDArray[Any],
    new_tokens: NDArray[Any],
    page_size: int,
    costs: tuple[Any, ...],  # DecodeCosts
    share: bool,
    capacity: tuple[int, int, int, int] | None,
) -> tuple[NDArray[np.int32], tuple[int, int, int, int], float]: ...  # plan, sizes, predicted time

# Addresses, then strides of the rows and of the heads in elements (csrc/cpu/trie_attention.h).
_Strided = tuple[int, int, int]

def trie_attention_forward(
    sizes: tuple[int, int, int, int],  # tokens, heads, KV heads, head dim
    dtype: int,
    scale: float,
    softcap: float,  # 0: none
    threads: int,
    trie: tuple[int, int],  # addresses: subtree_ends, window_starts or 0
    q: _Strided,
    k: _Strided,
    v: _Strided,
    out: int,
    lse: int,
    /,
) -> None: ...
def trie_attention_backward(
    sizes: tuple[int, int, int, int],
    dtype: int,
    scale: float,
    softcap: float,
    threads: int,
    trie: tuple[int, int],
    q: _Strided,
    k: _Strided,
    v: _Strided,
    out: int,
    lse: int,
    dout: _Strided,
    dq: int,
    dk: int,
    dv: int,
    /,
) -> None: ...
def trie_decode(
    # rows, items, partial slots, heads, KV heads, head dim, page size (csrc/cpu/trie_decode.h)
    sizes: tuple[int, int, int, int, int, int, int],
    dtype: int,
    scale: float,
    window: int,  # 0: none
    softcap: float,  # 0: none
    sinks: int,  # address; 0: none
    threads: int,
    # addresses: rows, positions, slots, merge_ptr, merge_slots, items, pages
    plan: tuple[int, int, int, int, int, int, int],
    q: _Strided,
    out: int,
    kv: tuple[int, int, int, int, int],  # addresses of K and V, strides of pages, slots, heads
    new_k: _Strided,  # address 0: nothing to write
    new_v: _Strided,
    /,
) -> None: ...
def few_row_linear(
    rows: int,
    inputs: int,
    outputs: int,
    threads: int,
    # addresses
    x: int,
    weight: int,
    bias: int,  # 0: none
    y: int,
    /,
) -> None: ...
def cpu_instruction_sets() -> list[str]: ...

# The driver's answer in one line, empty if it has a device.
def cuda_driver_missing() -> str: ...

# rows, items, tile rows, multiprocessors, heads, KV heads, head dim, pages, page size
# (csrc/cuda/decode/trie_decode.h)
_CudaDecodeSizes = tuple[int, int, int, int, int, int, int, int, int]
# addresses of K and V, strides of pages, slots, heads
_CudaPages = tuple[int, int, int, int, int]

def cuda_trie_decode_refusal(sizes: _CudaDecodeSizes, dtype: int, kv: _CudaPages, /) -> str: ...
def cuda_trie_decode(
    sizes: _CudaDecodeSizes,
    dtype: int,
    scale: float,
    place: tuple[int, int, str],  # device, stream, file of the kernels
    # addresses: rows, positions, slots, merge_ptr, merge_slots, items, pages
    plan: tuple[int, int, int, int, int, int, int],
    q: _Strided,
    kv: _CudaPages,
    new_k: _Strided,  # address 0: nothing to write
    new_v: _Strided,
    # addresses: out, partial outputs, partial lse, counter of units
    results: tuple[int, ...],
    /,
) -> None: ...

# tokens, heads, KV heads, head dim, dtype, multiprocessors (csrc/cuda/attention/trie_attention.h)
_CudaAttentionSizes = tuple[int, int, int, int, int, int]
# whether the kernel is the fine one; addresses: row_ptr, full_end, kv_blocks, q_order
_CudaRows = tuple[bool, int, int, int, int]

def cuda_trie_attention_forward(
    sizes: _CudaAttentionSizes,
    scale: float,
    place: tuple[int, int, str],  # device, stream, file of the kernels
    ends: int,
    rows: _CudaRows,
    tensors: tuple[_Strided, _Strided, _Strided, _Strided],  # q, k, v, out
    lse: int,
    /,
) -> None: ...
def cuda_trie_attention_backward(
    sizes: _CudaAttentionSizes,
    scale: float,
    place: tuple[int, int, str],
    ends: int,
    rows: _CudaRows,
    columns: tuple[bool, int, int],  # likewise; addresses: q_range, kv_order
    tensors: tuple[_Strided, _Strided, _Strided, _Strided],  # q, k, v, out
    gradients: tuple[_Strided, _Strided, _Strided, _Strided],  # of out, q, k, v
    stats: tuple[int, int, int],  # addresses: lse, lse2, delta
    /,
) -> None: ...
