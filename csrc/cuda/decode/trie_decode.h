// trie_decode on a Hopper GPU: what the host (launch.cpp) and the kernels (trie_decode.cu) tell each
// other. Plain C++: both compile it.
//
// Three launches a call. `write` puts the new keys and values in their slots: a launch of its own,
// because any item may read any of them, and the end of a launch orders the writes of all blocks
// before the reads of all. `partial` leaves the softmax of every item, `merge` weighs the items of
// each row. Grids follow from the plan's capacity alone, so that a CUDA graph can be replayed on
// another plan in the same buffers; padding rows and items do nothing.
#pragma once

#include <cstdint>
#include <string>

#include "cuda/driver.h"
#include "cuda/hopper/index.h"
#include "trie/decode_plan.h"

namespace tw::cuda {

// [num_pages, page_size, kv_heads, head_dim] twice, the same way.
struct Pages {
  void *k, *v;
  int64_t page_stride, slot_stride, head_stride;
};

struct TrieDecodeArgs {
  int64_t rows, num_items, partial_slots; // padding included
  int64_t tile_rows;                      // no item has more rows
  int64_t heads, kv_heads, head_dim;      // heads is a multiple of kv_heads
  int64_t num_pages, page_size;
  Element element; // bfloat16 or float16
  float scale;
  // The plan's arrays (DecodePlan in trie/decode_plan.h). Padding rows have slot -1 and merge
  // nothing.
  const int32_t *caller_rows, *positions, *slots, *merge_ptr, *merge_slots, *pages;
  const DecodeItem *items; // [num_items]
  Heads q;                 // [rows, heads, head_dim]
  Heads new_k, new_v;      // [rows, kv_heads, head_dim], or null: the pages hold them already
  Pages kv;
  void *out;          // [rows, heads, head_dim], contiguous
  float *partial_out; // [partial_slots, heads, head_dim], normalised
  float *partial_lse; // [partial_slots, heads], base 2; -inf where a row sees no key of the item,
                      // and its output is 0
};

// Empty if the kernels take these shapes and pages, else the reason in one line.
std::string why_not(const TrieDecodeArgs &args);

// Rows of q, new_k and new_v lie on 16 bytes, row and head strides too. Keys that no row of an item
// sees may hold anything, NaN too. Throws what the driver refuses.
void trie_decode(const TrieDecodeArgs &args, const Launcher &launcher);

// ---- The parameter of each kernel.

struct WriteArguments {
  Heads new_k, new_v;
  Pages kv;
  const int32_t *rows, *slots;
  int32_t kv_heads, head_dim, page_size;
};

struct PartialArguments {
  TensorMap k, v; // [num_pages, page_size, kv_heads, head_dim], in boxes of the keys of a page in a
                  // tile
  Heads q;
  float *out, *lse;
  const int32_t *rows, *positions, *pages;
  const DecodeItem *items;
  int32_t kv_heads, group; // heads = kv_heads x group
  int32_t page_size;
  int32_t row_blocks; // blocks for the matrix rows of an item
  float scale_log2;   // scale x log2(e)
};

struct MergeArguments {
  const float *partial_out, *partial_lse;
  void *out;
  const int32_t *rows, *merge_ptr, *merge_slots;
  int32_t num_rows, heads;
};

} // namespace tw::cuda
