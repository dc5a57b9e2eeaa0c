// trie_decode on a Hopper GPU: what the host and the kernels tell each other. Plain C++: both
// compile it.
//
//   trie_decode.cu   the kernels: write, attend, merge
//   feed.h           the warps of attend that take units, and fetch their keys and queries
//   attend.h         the warpgroups of attend that multiply
//   shared.h         what these share in shared memory
//   index.h          sizes and index arithmetic
//   launch.cpp       the host's half
//
// Three launches a call, each begun before the last has ended: `write` puts the new keys and values
// in their slots, because any unit may read any of them; `attend` leaves the softmax of every item,
// and the output of rows that have but one; `merge` weighs the items of the other rows. Grids follow
// from the plan's capacity alone, so that a CUDA graph can be replayed on another plan in the same
// buffers; padding rows and items do nothing.
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
  int64_t rows, num_items; // padding included
  int64_t tile_rows;       // no item has more rows
  int64_t multiprocessors;
  int64_t heads, kv_heads, head_dim; // heads is a multiple of kv_heads
  int64_t num_pages, page_size;
  Element element; // bfloat16 or float16
  float scale;
  // The plan's arrays (DecodePlan in trie/decode_plan.h). Padding rows have slot -1 and merge
  // nothing; padding items come last.
  const int32_t *caller_rows, *positions, *slots, *merge_ptr, *merge_slots, *pages;
  const DecodeItem *items; // [num_items]
  Heads q;                 // [rows, heads, head_dim]
  Heads new_k, new_v;      // [rows, kv_heads, head_dim], or null: the pages hold them already
  Pages kv;
  void *out;          // [rows, heads, head_dim], contiguous
  void *partial_out;  // [partial slots, heads, head_dim], normalised, of `element`
  float *partial_lse; // [partial slots, heads], base 2; -inf where a row sees no key of the item,
                      // and its output is 0
  int32_t *next_unit; // scratch
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
  int32_t *next_unit; // becomes 0
  int32_t num_rows;   // that have keys and values to write
  int32_t kv_heads, head_dim, page_size;
};

struct AttendArguments {
  TensorMap k, v; // [num_pages, page_size, kv_heads, head_dim], in boxes of the keys of a page in a
                  // tile
  Heads q;
  void *out, *partial_out;
  float *partial_lse;
  int32_t *next_unit; // which no block has taken yet
  const int32_t *rows, *positions, *merge_ptr, *pages;
  const DecodeItem *items;
  int32_t num_items;
  int32_t kv_heads, group; // heads = kv_heads x group
  int32_t page_size;
  int32_t row_tiles; // units for the matrix rows of an item and KV head
  float scale_log2;  // scale x log2(e)
};

struct MergeArguments {
  const void *partial_out;
  const float *partial_lse;
  void *out;
  const int32_t *rows, *merge_ptr, *merge_slots;
  int32_t num_rows, heads;
};

} // namespace tw::cuda
