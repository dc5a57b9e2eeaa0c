#include "trie_attention.h"

#include <algorithm>
#include <vector>

#include "isa.h"
#include "scratch.h"
#include "threads.h"
#include "trie_attention_job.h"

namespace tw {

namespace {

// How finely one KV head is cut. A cut costs a rebuilt path and one more sum of dK and dV, so no
// piece is below kPieceWork (multiply-adds of one product), and there are at most about kTasks
// tasks. Nothing here may depend on the number of threads: the cuts decide in which order dK and dV
// are summed.
constexpr double kPieceWork = 8e6;
constexpr int64_t kTasks = 64;

// Below this many multiply-adds a product, over all heads, the hand-off to other threads does not
// pay: it takes about 5 us, and at twice this work (40 us on one thread) two threads save 10. Where
// idle threads sleep it takes 10 us more: at 5e5 two threads then save 6 of 95 us.
constexpr double kOneThread = 3e5;

const TrieAttentionKernels &kernels() {
  switch (chosen_isa()) {
#if defined(__x86_64__)
  case Isa::avx512bf16: // what it adds serves trie_decode alone
  case Isa::avx512: return avx512::trie_attention;
  case Isa::avx2: return avx2::trie_attention;
#endif
  default: return portable::trie_attention;
  }
}

struct Plan {
  std::vector<int32_t> depths; // of every token: its number of strict ancestors
  std::vector<Piece> pieces;
  int64_t max_path = 0;
  int64_t share_rows = 0;
  double work = 0; // multiply-adds of one product, all heads
};

Plan make_plan(const TrieAttentionArgs &a, int64_t tile_rows) {
  Plan plan;
  plan.depths.resize(a.tokens);
  std::vector<int32_t> open; // ends of the subtrees around the current token
  for (int32_t i = 0; i < a.tokens; ++i) {
    while (!open.empty() && open.back() <= i) open.pop_back();
    plan.depths[i] = static_cast<int32_t>(open.size());
    open.push_back(a.subtree_ends[i]);
  }
  // The first column that any of these rows sees.
  const auto first_seen = [&](int64_t row, int64_t end) {
    return a.window_starts ? *std::min_element(a.window_starts + row, a.window_starts + end) : 0;
  };
  // Number of strict ancestors of `row` before `column`: an ancestor of it or of a later row, or 0.
  const auto skipped = [&](int64_t row, int64_t column) {
    return plan.depths[std::min(row, column)];
  };
  int64_t pairs = 0;
  const auto tile_pairs = [&](int64_t row) {
    const int64_t rows = std::min(tile_rows, a.tokens - row);
    return rows * (plan.depths[row] - skipped(row, first_seen(row, row + rows)) + rows);
  };
  for (int64_t row = 0; row < a.tokens; row += tile_rows) {
    pairs += tile_pairs(row);
    plan.max_path = std::max<int64_t>(plan.max_path, plan.depths[row]);
  }
  const double group_work = 1.0 * pairs * a.head_dim * (a.heads / a.kv_heads);
  plan.work = group_work * a.kv_heads;
  const int64_t most = std::max<int64_t>(1, kTasks / a.kv_heads);
  const int64_t wanted = std::clamp<int64_t>(group_work / kPieceWork, 1, most);

  int64_t done = 0;
  for (int64_t row = 0; row < a.tokens; row += tile_rows) {
    if (done * wanted >= pairs * static_cast<int64_t>(plan.pieces.size())) {
      if (!plan.pieces.empty()) plan.pieces.back().end_row = row;
      plan.pieces.push_back({row, a.tokens, 0, 0, 0, 0});
    }
    done += tile_pairs(row);
  }
  for (Piece &p : plan.pieces) {
    p.first_column = first_seen(p.first_row, p.end_row);
    p.skipped = skipped(p.first_row, p.first_column);
    p.path = plan.depths[p.first_row] - p.skipped;
    p.share = plan.share_rows;
    plan.share_rows += p.path + p.end_row - p.first_row;
  }
  return plan;
}

void run(const TrieAttentionArgs &args, int threads, bool is_backward) {
  const TrieAttentionKernels &kernel = kernels();
  const Plan plan = make_plan(args, kernel.tile_rows);
  TrieAttentionJob job{};
  job.args = args;
  job.pieces = plan.pieces.data();
  job.num_pieces = static_cast<int64_t>(plan.pieces.size());
  job.max_path = plan.max_path;
  job.depths = plan.depths.data();
  job.share_rows = plan.share_rows;
  job.workspace_bytes = kernel.workspace_bytes(job);

  const int64_t tasks = args.kv_heads * job.num_pieces;
  if (plan.work < kOneThread) threads = 1;
  threads = static_cast<int>(std::clamp<int64_t>(threads, 1, tasks));
  const bool has_shares = is_backward && job.num_pieces > 1;
  const int64_t share_floats =
      has_shares ? args.kv_heads * plan.share_rows * 2 * kernel.padded(args.head_dim) : 0;
  char *memory = scratch(share_floats * sizeof(float) + threads * job.workspace_bytes);
  job.shares = reinterpret_cast<float *>(memory);
  job.workspaces = memory + share_floats * sizeof(float);

  parallel_for(tasks, threads, is_backward ? kernel.backward : kernel.forward, &job);
  if (has_shares) {
    const int64_t chunks = (args.tokens + kSumColumns - 1) / kSumColumns;
    parallel_for(args.kv_heads * chunks, threads, kernel.sum_shares, &job);
  }
}

} // namespace

void trie_attention_forward(const TrieAttentionArgs &args, int threads) {
  run(args, threads, false);
}

void trie_attention_backward(const TrieAttentionArgs &args, int threads) {
  run(args, threads, true);
}

} // namespace tw
