// Geometry that kernels read, derived from `subtree_ends` alone (docs/architecture.md, facts
// 2 to 4).
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace tw {

// Tokens on the longest path of the forest. Throws std::invalid_argument unless the ends are those of
// a forest in preorder: i < subtree_ends[i] <= n, and every subtree lies within its parent's. O(n).
int32_t longest_path(const int32_t *subtree_ends, int64_t n);

// Of every token the first ancestor in its window, [n]: its (window - 1)-th, or its root if it has
// fewer. Ancestors ascend with depth, so token i sees token j within the window iff
// window_starts[i] <= j <= i < subtree_ends[j]. For window >= 1; O(n).
std::vector<int32_t> window_starts(const int32_t *subtree_ends, int64_t n, int64_t window);

// Node segments in preorder, three ints each: start, end, subtree_end. A segment is a maximal run in
// which every token is the only child of the one before it.
std::vector<int32_t> node_segments(const int32_t *subtree_ends, int64_t n);

// Which pairs (block of query rows, block of KV columns) hold a visible pair, and which are full
// (every row sees every column, so the kernel needs no mask).
//
// A window leaves out the pairs whose last column lies before all that the rows see (q_starts; some
// listed pairs may then hold no visible one), and only pairs whose first column every row's window
// reaches are full. A KV block's query blocks may have gaps then: of q_range, those are left out
// whose least start is above the last column, and of [full_first, full_last) only those are full
// whose greatest start is not above the first column.
struct BlockSchedule {
  std::vector<int32_t> row_ptr;   // [nq + 1]
  std::vector<int32_t> full_end;  // [nq]: kv_blocks[row_ptr[b], full_end[b]) are full
  std::vector<int32_t> kv_blocks; // [nnz]: each part ascending
  std::vector<int32_t> q_range;   // [nkv, 4]: first, full_first, full_last, last, in query blocks
  std::vector<int32_t> q_order;   // [nq]: most KV blocks first
  std::vector<int32_t> kv_order;  // [nkv]: most query blocks first
  std::vector<int32_t> q_starts;  // [nq, 2]: least and greatest of window_starts; no window: empty
};

// O(n + blocks touched).
BlockSchedule block_schedule(const int32_t *subtree_ends, int64_t n, int32_t block_q,
                             int32_t block_kv, std::optional<int64_t> window = std::nullopt);

} // namespace tw
