// One item of a decode plan for one KV head: its memory, its keys, how it starts and how it ends.
#pragma once

#include "pairs.h"
#include "trie_decode_dot.h"
#include "trie_decode_job.h"

namespace tw::TW_ISA {

namespace {

constexpr int64_t kBlock = 64;               // keys between two updates of the softmax
constexpr int64_t kPairBlock = 2 * kBlock;   // the same in products of pairs: as many words of V
constexpr int64_t kRun = 16;                 // keys fetched at a time
constexpr int64_t kTileRows = 2 * kLanes;    // matrix rows that a block of scores holds
// Matrix rows up to which dot products are faster. Measured at D = 64; against products of pairs
// also at 128, where they win from fewer rows on.
constexpr int64_t kFewRows = 12, kFewPairRows = 5 * 64; // the latter over head_dim

static_assert(kBlock % kLanes == 0 && kRun % kLanes == 0);

// A worker's memory for one task. width: head_dim rounded up to whole vectors; the rest is zero.
struct DecodeWorkspace {
  float *k, *v;     // [kBlock][width], keys and values packed
  float *p;         // scores, then probabilities: [keys][kTileRows], or [rows][kBlock] of few
  float *q;         // [tiles][width][kTileRows], or [rows][width] of few
  float *q_rows;    // [kTileRows][width], before transposition; later one row of values
  float *top, *sum, *factor; // [matrix rows]
  int32_t *first, *visible; // [matrix rows]: row r sees the item's keys from first[r], 0 without a
                            // window and then not set, to below visible[r]

  // Carves the arrays out of memory that starts at `base`; returns where they end.
  char *place(char *base, int64_t matrix_rows, int64_t width) {
    const auto take = [&](auto *&p, int64_t n) {
      p = reinterpret_cast<std::remove_reference_t<decltype(p)>>(base);
      base += (n * 4 + 63) / 64 * 64;
    };
    const int64_t rows = (matrix_rows + kTileRows - 1) / kTileRows * kTileRows;
    take(k, kBlock * width), take(v, kBlock * width);
    take(p, max(kPairBlock * kTileRows, kBlock * kFewRows));
    take(q, rows * width), take(q_rows, kTileRows * width);
    take(top, rows), take(sum, rows), take(factor, rows);
    take(first, rows), take(visible, rows);
    return base;
  }
};

int64_t workspace_bytes(const TrieDecodeJob &job) {
  DecodeWorkspace w;
  char *none = nullptr;
  return w.place(none, job.matrix_rows, padded(job.args.head_dim)) - none;
}

// What is not finite becomes 0.
template <class Word> void keep_finite(Word *p, int64_t words) {
  for (int64_t i = 0; i < words; i += kLanes) store(p + i, finite_or_zero(load(p + i)));
}

// One item of one KV head. Matrix row r is query row r / group, query head r % group of the KV
// head's.
struct ItemTask {
  const TrieDecodeJob &job;
  const TrieDecodeArgs &args;
  const DecodeItem &item;
  const int64_t kv_head, group, rows, head_dim, width;
  const int64_t first_result; // of this item and KV head, in units of matrix rows
  float *const acc;           // [rows][width], the partial result itself
  const int64_t start;        // the first key that some row sees
  int64_t full_begin = 0, full_end = 0; // every row sees the keys between; known after begin()
  DecodeWorkspace w;

  ItemTask(const void *context, int64_t index, int worker)
      : job(*static_cast<const TrieDecodeJob *>(context)), args(job.args),
        item(args.items[index / args.kv_heads]), kv_head(index % args.kv_heads),
        group(args.heads / args.kv_heads), rows((item.end_row - item.first_row) * group),
        head_dim(args.head_dim), width(padded(head_dim)),
        first_result((kv_head * args.partial_slots + item.first_slot) * group),
        acc(job.partial_out + first_result * width),
        start(job.first_keys ? job.first_keys[index / args.kv_heads] : 0) {
    w.place(job.workspaces + worker * job.workspace_bytes, job.matrix_rows, width);
  }

  // The keys from `key` on that lie in one page, at most kRun.
  struct Run {
    const char *k, *v;
    int64_t count;
  };
  TW_INLINE Run run_at(int64_t key, int64_t end) const {
    const int64_t slot = key % args.page_size, size = size_of(args.dtype);
    const int64_t page = args.pages[item.first_page + key / args.page_size];
    const int64_t at = page * args.kv.page_stride + slot * args.kv.slot_stride +
                       kv_head * args.kv.head_stride;
    return {static_cast<const char *>(args.kv.k) + at * size,
            static_cast<const char *>(args.kv.v) + at * size,
            min(kRun, min(args.page_size - slot, end - key))};
  }

  // Asks for keys some way ahead: pages lie anywhere, and a head's rows a stride apart, which
  // hardware prefetchers miss. (Not inlined, GCC takes it for a function without effect and drops
  // the call.)
  TW_INLINE void prefetch(int64_t key, int64_t count) const {
    for (const int64_t end = min(key + count, item.num_keys); key < end;) {
      const Run run = run_at(key, end);
      const int64_t size = size_of(args.dtype), stride = args.kv.slot_stride * size;
      for (int64_t i = 0; i < run.count; ++i)
        for (int64_t byte = 0; byte < head_dim * size; byte += 64) {
          __builtin_prefetch(run.k + i * stride + byte, 0, 2);
          __builtin_prefetch(run.v + i * stride + byte, 0, 2);
        }
      key += run.count;
    }
  }

  void prefetch_first() const { prefetch(start, kPairBlock); }

  // Matrix row r of q as floats.
  void load_query(float *to, int64_t r) const {
    const int64_t row = args.caller_rows[item.first_row + r / group];
    const int64_t head = kv_head * group + r % group;
    const int64_t at = row * args.q.row_stride + head * args.q.head_stride;
    const char *from = static_cast<const char *>(args.q.data) + at * size_of(args.dtype);
    load_row(to, from, args.dtype, head_dim);
  }

  void begin() {
    full_end = item.num_keys;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t end = args.positions[item.first_row + r / group] + 1 - item.first_position;
      w.visible[r] = static_cast<int32_t>(max(0, min(item.num_keys, end)));
      full_end = min(full_end, w.visible[r]);
      if (args.window) {
        w.first[r] = static_cast<int32_t>(max(0, min(item.num_keys, end - args.window)));
        full_begin = max(full_begin, w.first[r]);
      }
      w.top[r] = -1e30f; // below any score, and finite: masked scores are infinitely below it
      w.sum[r] = 0;
    }
    memset(acc, 0, rows * width * 4);
    prefetch_first(); // the rest as keys are read
  }

  // Whether a value of keys [c0, c1) is NaN or infinite while some row does not see all of them. A
  // row that does not see it weighs it with 0, which makes NaN. The product then takes 0 in place
  // of such values, and add_nonfinite adds them to the rows that see them.
  bool hides_nonfinite(int64_t c0, int64_t c1) const {
    if (c0 >= full_begin && c1 <= full_end) return false;
    Floats sum = {}; // NaN as soon as one is not finite
    for (int64_t c = c0; c < c1; ++c) {
      load_row(w.q_rows, run_at(c, c1).v, args.dtype, head_dim);
      for (int64_t d = 0; d < width; d += kLanes) sum += load(w.q_rows + d) - load(w.q_rows + d);
    }
    return sum_of_lanes(sum) != 0;
  }

  // To the matrix rows [first_row, end_row) what is not finite in the values of keys [c0, c1) that
  // they see.
  void add_nonfinite(int64_t first_row, int64_t end_row, int64_t c0, int64_t c1) const {
    for (int64_t c = c0; c < c1; ++c) {
      load_row(w.q_rows, run_at(c, c1).v, args.dtype, head_dim);
      for (int64_t r = first_row; r < end_row; ++r) {
        if (c >= w.visible[r] || (args.window && c < w.first[r])) continue;
        for (int64_t d = 0; d < width; d += kLanes) {
          const Floats x = load(w.q_rows + d);
          store(acc + r * width + d, load(acc + r * width + d) + (x - finite_or_zero(x)));
        }
      }
    }
  }

  void finish() const {
    memcpy(job.partial_top + first_result, w.top, rows * 4);
    memcpy(job.partial_sum + first_result, w.sum, rows * 4);
  }
};

} // namespace

} // namespace tw::TW_ISA
