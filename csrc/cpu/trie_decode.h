// trie_decode on the CPU: one decode plan, one layer, one call. Arithmetic is float32, but for the
// products of bfloat16 pages where the processor has them (pairs.h).
//
// A task is one item of the plan for one KV head. Its matrix rows are the item's query rows times
// the query heads that share the KV head: all of them meet a block of keys while it is in cache.
// Partial results then merge row by row, in the plan's order.
#pragma once

#include <cstdint>

#include "trie/decode_plan.h"
#include "trie_attention.h"

namespace tw {

// [pages, page_size, kv_heads, head_dim] twice, last dimension contiguous; strides in elements.
struct PagedHeads {
  void *k, *v;
  int64_t page_stride, slot_stride, head_stride;
};

struct TrieDecodeArgs {
  int64_t rows, num_items, partial_slots; // rows: padding included
  int64_t heads, kv_heads, head_dim, page_size; // heads is a multiple of kv_heads
  Dtype dtype;
  float scale;
  int64_t window;     // a row at position p sees positions in (p - window, p]; 0: all up to p
  float softcap;      // scores become softcap * tanh(score / softcap); 0: they stay as they are
  const float *sinks; // [heads], one more logit in the denominator of each softmax; null: none
  // The plan's arrays (DecodePlan in decode_plan.h). Padding rows have slot -1 and merge nothing.
  const int32_t *caller_rows, *positions, *slots, *merge_ptr, *merge_slots, *pages;
  const DecodeItem *items; // [num_items]
  Heads q, out;       // [rows, heads, head_dim]
  Heads new_k, new_v; // [rows, kv_heads, head_dim], or null: the pages hold them already
  PagedHeads kv;
};

// On at most `threads` threads. Results do not depend on `threads`, bit for bit. Keys and values
// that a row does not see may hold anything, NaN too, without an effect on it. Pages before the
// windows of all rows of an item, and those in no item, are not read.
void trie_decode(const TrieDecodeArgs &args, int threads);

} // namespace tw
