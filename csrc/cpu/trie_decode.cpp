#include "trie_decode.h"

#include <algorithm>
#include <vector>

#include "isa.h"
#include "scratch.h"
#include "threads.h"
#include "trie_decode_job.h"

namespace tw {

namespace {

// Below this much work the hand-off to other threads, about 5 us, does not pay. In multiply-adds of
// one product; fetching a key counts as much as kFetchRows matrix rows.
constexpr double kOneThread = 3e5;
constexpr int64_t kFetchRows = 4;
// The same for copies, in bytes.
constexpr int64_t kOneThreadBytes = 256 << 10;

const TrieDecodeKernels &kernels() {
  switch (chosen_isa()) {
#if defined(__x86_64__)
  case Isa::avx512bf16: return avx512bf16::trie_decode;
  case Isa::avx512: return avx512::trie_decode;
  case Isa::avx2: return avx2::trie_decode;
#endif
  default: return portable::trie_decode;
  }
}

// The first key of an item in the window of one of its rows; num_keys if there is none.
int32_t first_key(const TrieDecodeArgs &args, const DecodeItem &item) {
  int64_t first = item.num_keys;
  for (int32_t row = item.first_row; row < item.end_row; ++row) {
    const int64_t end = args.positions[row] + int64_t{1} - item.first_position;
    if (end > 0) first = std::min(first, std::max<int64_t>(0, end - args.window));
  }
  return static_cast<int32_t>(first);
}

} // namespace

void trie_decode(const TrieDecodeArgs &args, int threads) {
  const TrieDecodeKernels &kernel = kernels();
  TrieDecodeJob job{};
  job.args = args;
  const int64_t group = args.heads / args.kv_heads;
  double work = 0;
  std::vector<int32_t> first_keys(args.window ? args.num_items : 0);
  for (int64_t i = 0; i < args.num_items; ++i) {
    const DecodeItem &item = args.items[i];
    const int64_t rows = (item.end_row - item.first_row) * group;
    job.matrix_rows = std::max(job.matrix_rows, rows);
    if (args.window) first_keys[i] = first_key(args, item);
    const int32_t unseen = args.window ? first_keys[i] : 0;
    work += 1.0 * (item.num_keys - unseen) * (kFetchRows + rows);
  }
  job.first_keys = args.window ? first_keys.data() : nullptr;
  job.threads = work * args.kv_heads * args.head_dim < kOneThread ? 1 : std::max(threads, 1);
  const int64_t element = args.dtype == Dtype::float32 ? 4 : 2;
  const int64_t new_bytes = 2 * element * args.rows * args.kv_heads * args.head_dim;
  const int64_t results = args.partial_slots * args.heads;
  const int64_t result_bytes = 4 * results * args.head_dim;

  job.workspace_bytes = kernel.workspace_bytes(job);
  const int64_t width = kernel.padded(args.head_dim);
  const int64_t partial_bytes = (results * (width + 2) * 4 + 63) / 64 * 64;
  char *memory = scratch(partial_bytes + std::max(threads, 1) * job.workspace_bytes);
  job.partial_out = reinterpret_cast<float *>(memory);
  job.partial_top = job.partial_out + results * width;
  job.partial_sum = job.partial_top + results;
  job.workspaces = memory + partial_bytes;

  if (args.new_k.data)
    parallel_for(args.rows, new_bytes < kOneThreadBytes ? 1 : threads, kernel.write, &job);
  parallel_for(args.num_items * args.kv_heads, job.threads, kernel.attend, &job);
  parallel_for(args.rows, result_bytes < kOneThreadBytes ? 1 : threads, kernel.merge, &job);
}

} // namespace tw
