#include "schedule.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

namespace tw {

int32_t longest_path(const int32_t *subtree_ends, int64_t n) {
  std::vector<int32_t> open; // ends of the subtrees around the current token
  size_t longest = 0;
  for (int64_t i = 0; i < n; ++i) {
    while (!open.empty() && open.back() <= i) open.pop_back();
    const int64_t end = subtree_ends[i], most = open.empty() ? n : open.back();
    if (end <= i || end > most)
      throw std::invalid_argument("subtree_ends[" + std::to_string(i) + "] is " +
                                  std::to_string(end) + ": must be above " + std::to_string(i) +
                                  " and at most " + std::to_string(most) + ", where " +
                                  (open.empty() ? "the tokens end" : "its parent's subtree ends"));
    open.push_back(static_cast<int32_t>(end));
    longest = std::max(longest, open.size());
  }
  return static_cast<int32_t>(longest);
}

std::vector<int32_t> window_starts(const int32_t *subtree_ends, int64_t n, int64_t window) {
  std::vector<int32_t> starts(n), path; // the current token's, from its root to itself
  for (int32_t i = 0; i < n; ++i) {
    while (!path.empty() && subtree_ends[path.back()] <= i) path.pop_back();
    path.push_back(i);
    const int64_t length = static_cast<int64_t>(path.size());
    starts[i] = path[std::max<int64_t>(0, length - window)];
  }
  return starts;
}

std::vector<int32_t> node_segments(const int32_t *subtree_ends, int64_t n) {
  std::vector<int32_t> nodes;
  for (int64_t start = 0; start < n;) {
    const int32_t subtree_end = subtree_ends[start];
    int64_t end = start + 1;
    // In preorder, token `end` lies in the subtree of its left neighbour iff end < subtree_end, and
    // is that neighbour's only child iff both subtrees end together.
    while (end < subtree_end && subtree_ends[end] == subtree_end) ++end;
    nodes.insert(nodes.end(),
                 {static_cast<int32_t>(start), static_cast<int32_t>(end), subtree_end});
    start = end;
  }
  return nodes;
}

namespace {

// For every token its nearest ancestor in an earlier KV block, or -1: following it from a token
// visits every KV block on the token's path exactly once.
std::vector<int32_t> block_exits(const int32_t *subtree_ends, int64_t n, int32_t block_kv) {
  std::vector<int32_t> exit(n), parents(n);
  for (int32_t i = 0; i < n; ++i) {
    // The parent is the nearest ancestor-or-self of the left neighbour whose subtree is still open.
    int32_t p = i - 1;
    while (p >= 0 && subtree_ends[p] <= i) p = parents[p];
    parents[i] = p;
    const bool same_block = p >= 0 && p / block_kv == i / block_kv;
    exit[i] = same_block ? exit[p] : p;
  }
  return exit;
}

std::vector<int32_t> longest_first(const std::vector<int32_t> &work) {
  std::vector<int32_t> order(work.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return work[a] > work[b]; });
  return order;
}

} // namespace

BlockSchedule block_schedule(const int32_t *subtree_ends, int64_t n, int32_t block_q,
                             int32_t block_kv, std::optional<int64_t> window) {
  const int64_t nq = (n + block_q - 1) / block_q, nkv = (n + block_kv - 1) / block_kv;
  BlockSchedule s;

  // A KV block that reaches beyond the last token is never full: its missing columns need the mask.
  std::vector<int32_t> min_end(nkv);
  for (int64_t c = 0; c < nkv; ++c) {
    const int64_t first = c * block_kv, last = std::min(n, first + block_kv);
    const int32_t least = *std::min_element(subtree_ends + first, subtree_ends + last);
    min_end[c] = last - first == block_kv ? least : 0;
  }

  if (window) {
    const std::vector<int32_t> starts = window_starts(subtree_ends, n, *window);
    for (int64_t b = 0; b < nq; ++b) {
      const auto first = starts.begin() + b * block_q;
      const auto ends = std::minmax_element(first, starts.begin() + std::min(n, (b + 1) * block_q));
      s.q_starts.insert(s.q_starts.end(), {*ends.first, *ends.second});
    }
  }

  const std::vector<int32_t> exit = block_exits(subtree_ends, n, block_kv);
  std::vector<int32_t> q_work(nq), kv_work(nkv), last_q(nkv), partial;
  s.row_ptr.push_back(0);
  for (int64_t b = 0; b < nq; ++b) {
    const int64_t first_row = b * block_q, end_row = std::min(n, first_row + block_q);
    const int64_t first_seen = window ? s.q_starts[2 * b] : 0;
    const int64_t all_see = window ? s.q_starts[2 * b + 1] : 0; // from here on, within the window
    const auto add = [&](int64_t c) {
      const bool full = (c + 1) * block_kv - 1 <= first_row && end_row <= min_end[c] &&
                        all_see <= c * block_kv;
      ++kv_work[c];
      last_q[c] = static_cast<int32_t>(b);
      (full ? s.kv_blocks : partial).push_back(static_cast<int32_t>(c));
    };
    // Columns seen by the rows: the rows themselves and the path of the first one. (A later row's
    // ancestors before the block are ancestors of the first row too: subtrees are intervals.)
    partial.clear();
    const int64_t own_first = first_row / block_kv;
    const int64_t first_block = first_seen / block_kv;
    for (int64_t c = (end_row - 1) / block_kv; c >= own_first; --c) add(c);
    for (int64_t t = first_row; (t = exit[t]) >= first_block * block_kv;) add(t / block_kv);
    std::reverse(s.kv_blocks.begin() + s.row_ptr.back(), s.kv_blocks.end());
    s.full_end.push_back(static_cast<int32_t>(s.kv_blocks.size()));
    s.kv_blocks.insert(s.kv_blocks.end(), partial.rbegin(), partial.rend());
    q_work[b] = static_cast<int32_t>(s.kv_blocks.size()) - s.row_ptr.back();
    s.row_ptr.push_back(static_cast<int32_t>(s.kv_blocks.size()));
  }

  for (int64_t c = 0; c < nkv; ++c) {
    const int64_t first_col = c * block_kv, last_col = first_col + block_kv - 1;
    const int32_t first = static_cast<int32_t>(first_col / block_q);
    const int32_t last = last_q[c] + 1;
    const int64_t full_rows_end = min_end[c] == n ? nq * block_q : min_end[c];
    int32_t full_first = static_cast<int32_t>((last_col + block_q - 1) / block_q);
    full_first = std::min(full_first, last);
    const int32_t full_last =
        std::clamp(static_cast<int32_t>(full_rows_end / block_q), full_first, last);
    s.q_range.insert(s.q_range.end(), {first, full_first, full_last, last});
  }
  s.q_order = longest_first(q_work);
  s.kv_order = longest_first(kv_work);
  return s;
}

} // namespace tw
