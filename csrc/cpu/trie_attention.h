// Trie attention for small tries on the CPU: one call a pass, float32 arithmetic.
//
// Rows are taken in tiles of consecutive tokens (whatever nodes they belong to) and columns one by
// one: a tile sees the ancestors of its first row and its own rows, nothing else
// (docs/architecture.md, facts 1 and 3). Tokens being in preorder, those ancestors are a stack: going down the tiles, a
// task keeps the K and V of the current path packed in float32, pushes each tile's own rows and
// drops columns once their subtree is over. Backward keeps dK and dV on the same stack, and a
// column's gradient is complete when it is dropped. Under a window a tile skips the first columns
// of the stack, those that none of its rows sees, and a piece of the rows never pushes those that
// none of its rows sees.
//
// A value that is not finite reaches only what it should: rows that see it in forward, and in
// backward the gradients that such a row, key or value is a term of. A product whose masked terms
// would be 0 * NaN is taken row by row instead, without them.
#pragma once

#include <cstdint>

namespace tw {

enum class Dtype : int { float32, bfloat16, float16 };

// [tokens, heads, head_dim], last dimension contiguous; strides in elements.
struct Heads {
  void *data;
  int64_t row_stride, head_stride;
};

struct TrieAttentionArgs {
  int64_t tokens, heads, kv_heads, head_dim; // heads is a multiple of kv_heads
  Dtype dtype;
  float scale;
  float softcap; // scores become softcap * tanh(score / softcap); 0: they stay as they are
  const int32_t *subtree_ends;  // [tokens]
  const int32_t *window_starts; // [tokens], the first column that a row sees; null: its root
  Heads q, k, v, out;
  float *lse; // [heads, tokens], natural logarithm
  Heads dout, dq, dk, dv; // backward only
};

// On at most `threads` threads. Results do not depend on `threads`, bit for bit.
void trie_attention_forward(const TrieAttentionArgs &args, int threads);
void trie_attention_backward(const TrieAttentionArgs &args, int threads);

} // namespace tw
