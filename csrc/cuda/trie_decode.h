// trie_decode on a Hopper GPU: what the host (trie_decode.cpp) and the kernels (trie_decode.cu)
// tell each other. Plain C++: both compile it.
//
// Three launches a call. `write` puts the new keys and values in their slots; it is a launch of its
// own because any item may read any of them, and the end of a launch is the one order between
// blocks that costs no waiting. `partial` leaves the softmax of every item, `merge` weighs the
// items of each row. Grids follow from the plan's capacity alone, so that a CUDA graph can be
// replayed on another plan in the same buffers: what is padding does nothing.
#pragma once

#include <cstdint>
#include <string>

#include "cuda/driver.h"
#include "trie/decode_plan.h"

namespace tw::cuda {

// [rows, heads, head_dim], last dimension contiguous; strides in elements.
struct Rows {
  void *data; // null: not there
  int64_t row_stride, head_stride;
};

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
  Rows q;                  // [rows, heads, head_dim]
  Rows new_k, new_v;       // [rows, kv_heads, head_dim], or null: the pages hold them already
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
void trie_decode(const TrieDecodeArgs &args, const OnDevice &device, void *stream,
                 const std::string &cubin);

// What the launches of a call are: the host's half of the kernels.

struct WriteArguments {
  Rows new_k, new_v;
  Pages kv;
  const int32_t *rows, *slots;
  int32_t kv_heads, head_dim, page_size;
};

struct PartialArguments {
  TensorMap k, v; // of page_tiles
  Rows q;
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

// K or V, [num_pages, page_size, kv_heads, head_dim], in boxes of the keys of a page in a tile.
Tiles page_tiles(const TrieDecodeArgs &args, const void *pages);
int warpgroups(const TrieDecodeArgs &args); // that share a tile of keys: 1 or 2
WriteArguments write_arguments(const TrieDecodeArgs &args);
PartialArguments partial_arguments(const TrieDecodeArgs &args); // but for the tensor maps
MergeArguments merge_arguments(const TrieDecodeArgs &args);
Grid write_grid(const TrieDecodeArgs &args);
Grid partial_grid(const TrieDecodeArgs &args);
Grid merge_grid(const TrieDecodeArgs &args);

} // namespace tw::cuda
