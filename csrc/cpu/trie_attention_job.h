// What the driver (trie_attention.cpp) and the kernels of each instruction set tell each other.
#pragma once

#include "trie_attention.h"

namespace tw {

// A contiguous piece of the rows. Backward of a piece yields a share of dK and dV for the columns
// of its first row's path that its rows see and, where later pieces see them, its own. Shares lie
// in this order, with room for all own columns; `share` counts the places before this piece's.
struct Piece {
  int64_t first_row, end_row; // first_row is a multiple of tile_rows
  int64_t first_column;       // no row sees one before it
  int64_t skipped, path;      // strict ancestors of first_row: before first_column, and from it on
  int64_t share;
};

struct TrieAttentionJob {
  TrieAttentionArgs args;
  const Piece *pieces;
  int64_t num_pieces;
  int64_t max_path; // strict ancestors of any tile's first row, at most
  const int32_t *depths;
  int64_t share_rows;  // of all pieces, for one KV head
  float *shares;       // [kv_heads, share_rows, 2 (dK, dV), padded head_dim] if num_pieces > 1
  char *workspaces;    // one a worker
  int64_t workspace_bytes;
};

struct TrieAttentionKernels {
  int64_t tile_rows;
  int64_t (*padded)(int64_t head_dim);
  int64_t (*workspace_bytes)(const TrieAttentionJob &);
  // Parallel tasks. forward, backward: index = KV head * num_pieces + piece.
  void (*forward)(const void *job, int64_t index, int worker);
  void (*backward)(const void *job, int64_t index, int worker);
  // Sums the shares of dK and dV: index = KV head * column chunks + chunk of kSumColumns.
  void (*sum_shares)(const void *job, int64_t index, int worker);
};

constexpr int64_t kSumColumns = 128;

namespace portable {
extern const TrieAttentionKernels trie_attention;
}
namespace avx2 {
extern const TrieAttentionKernels trie_attention;
}
namespace avx512 {
extern const TrieAttentionKernels trie_attention;
}

} // namespace tw
