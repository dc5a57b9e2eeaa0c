// What the driver (trie_decode.cpp) and the kernels of each instruction set tell each other.
#pragma once

#include "trie_decode.h"

namespace tw {

struct TrieDecodeJob {
  TrieDecodeArgs args;
  int64_t matrix_rows; // of any item, at most
  const int32_t *first_keys; // [items]: the first key that some row sees; null without a window
  // Softmax of an item so far: sum of 2^(score - top) * v, and of 2^(score - top); scores are in
  // base 2. A row that sees no key of the item has sum 0.
  float *partial_out;             // [kv_heads, partial_slots, group, padded head_dim]
  float *partial_top, *partial_sum; // [kv_heads, partial_slots, group]
  char *workspaces;               // one a worker
  int64_t workspace_bytes;
  int threads; // of `attend`
};

struct TrieDecodeKernels {
  int64_t (*padded)(int64_t head_dim);
  int64_t (*workspace_bytes)(const TrieDecodeJob &);
  // Parallel tasks.
  void (*write)(const void *job, int64_t index, int worker);  // index = row
  void (*attend)(const void *job, int64_t index, int worker); // index = item * kv_heads + KV head
  void (*merge)(const void *job, int64_t index, int worker);  // index = row
};

namespace portable {
extern const TrieDecodeKernels trie_decode;
}
namespace avx2 {
extern const TrieDecodeKernels trie_decode;
}
namespace avx512 {
extern const TrieDecodeKernels trie_decode;
}
namespace avx512bf16 {
extern const TrieDecodeKernels trie_decode;
}

} // namespace tw
