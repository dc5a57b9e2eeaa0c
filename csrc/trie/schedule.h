// Geometry that kernels read, derived from `subtree_ends` alone (docs/architecture.md, facts
// 2 to 4).
#pragma once

#include <cstdint>
#include <vector>

namespace tw {

// Node segments in preorder, three ints each: start, end, subtree_end. A segment is a maximal run in
// which every token is the only child of the one before it.
std::vector<int32_t> node_segments(const int32_t *subtree_ends, int64_t n);

// Which pairs (block of query rows, block of KV columns) hold a visible pair, and which are full
// (every row sees every column, so the kernel needs no mask).
struct BlockSchedule {
  std::vector<int32_t> row_ptr;   // [nq + 1]
  std::vector<int32_t> full_end;  // [nq]: kv_blocks[row_ptr[b], full_end[b]) are full
  std::vector<int32_t> kv_blocks; // [nnz]: each part ascending
  std::vector<int32_t> q_range;   // [nkv, 4]: first, full_first, full_last, last, in query blocks
  std::vector<int32_t> q_order;   // [nq]: most KV blocks first
  std::vector<int32_t> kv_order;  // [nkv]: most query blocks first
};

// O(n + blocks touched).
BlockSchedule block_schedule(const int32_t *subtree_ends, int64_t n, int32_t block_q,
                             int32_t block_kv);

} // namespace tw
