// The kernels of trie_decode.h, once for each instruction set; see simd.h for what to define.
//
// Where an item has few matrix rows, the time goes into fetching keys: they are read where they
// lie, head dim in the lanes, and a score is a dot product. Where it has many, the time goes into
// multiply-adds: keys are packed a block at a time and matrix rows are in the lanes, so that
// softmax runs down the keys without any sum across lanes.
#pragma once

#include "matmul.h"
#include "trie_decode_dot.h"
#include "trie_decode_job.h"

namespace tw::TW_ISA {

namespace {

constexpr int64_t kBlock = 64;               // keys between two updates of the softmax
constexpr int64_t kRun = 16;                 // keys fetched at a time
constexpr int64_t kTileRows = 2 * kLanes;    // matrix rows that a block of scores holds
constexpr int64_t kFewRows = 12;             // up to which dot products are faster (D = 64)

static_assert(kBlock % kLanes == 0 && kRun % kLanes == 0);

// A worker's memory for one task. width: head_dim rounded up to whole vectors; the rest is zero.
struct DecodeWorkspace {
  float *k, *v;     // [kBlock][width], keys and values packed
  float *p;         // scores, then probabilities: [kBlock][kTileRows], or [rows][kBlock] of few
  float *q;         // times scale * log2(e): [tiles][width][kTileRows], or [rows][width] of few
  float *q_rows;    // [kTileRows][width], before transposition
  float *top, *sum, *factor; // [matrix rows]
  int32_t *visible; // [matrix rows]: row r sees the item's keys below visible[r]

  // Carves the arrays out of memory that starts at `base`; returns where they end.
  char *place(char *base, int64_t matrix_rows, int64_t width) {
    const auto take = [&](auto *&p, int64_t n) {
      p = reinterpret_cast<std::remove_reference_t<decltype(p)>>(base);
      base += (n * 4 + 63) / 64 * 64;
    };
    const int64_t rows = (matrix_rows + kTileRows - 1) / kTileRows * kTileRows;
    take(k, kBlock * width), take(v, kBlock * width);
    take(p, kBlock * max(kTileRows, kFewRows));
    take(q, rows * width), take(q_rows, kTileRows * width);
    take(top, rows), take(sum, rows), take(factor, rows), take(visible, rows);
    return base;
  }
};

int64_t workspace_bytes(const TrieDecodeJob &job) {
  DecodeWorkspace w;
  char *none = nullptr;
  return w.place(none, job.matrix_rows, padded(job.args.head_dim)) - none;
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
  DecodeWorkspace w;

  ItemTask(const void *context, int64_t index, int worker)
      : job(*static_cast<const TrieDecodeJob *>(context)), args(job.args),
        item(args.items[index / args.kv_heads]), kv_head(index % args.kv_heads),
        group(args.heads / args.kv_heads), rows((item.end_row - item.first_row) * group),
        head_dim(args.head_dim), width(padded(head_dim)),
        first_result((kv_head * args.partial_slots + item.first_slot) * group),
        acc(job.partial_out + first_result * width) {
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

  // Asks for the keys some way ahead: pages lie anywhere, and a head's rows a stride apart, which
  // hardware prefetchers miss. (Not inlined, GCC takes it for a function without effect and drops
  // the call.)
  TW_INLINE void prefetch(int64_t key) const {
    if (key >= item.num_keys) return;
    const Run run = run_at(key, item.num_keys);
    const int64_t size = size_of(args.dtype), stride = args.kv.slot_stride * size;
    for (int64_t i = 0; i < run.count; ++i)
      for (int64_t byte = 0; byte < head_dim * size; byte += 64) {
        __builtin_prefetch(run.k + i * stride + byte, 0, 2);
        __builtin_prefetch(run.v + i * stride + byte, 0, 2);
      }
  }

  // Keys [c0, c1) to w.k and w.v.
  void pack(int64_t c0, int64_t c1) const {
    const int64_t stride = args.kv.slot_stride * size_of(args.dtype);
    float *k = w.k, *v = w.v;
    for (int64_t c = c0; c < c1;) {
      const Run run = run_at(c, c1);
      prefetch(c + kBlock);
      for (int64_t i = 0; i < run.count; ++i, k += width, v += width) {
        load_row(k, run.k + i * stride, args.dtype, head_dim);
        load_row(v, run.v + i * stride, args.dtype, head_dim);
      }
      c += run.count;
    }
  }

  // Matrix row r of q as floats, in units that make scores exponents of 2.
  void load_query(float *to, int64_t r) const {
    const int64_t row = args.caller_rows[item.first_row + r / group];
    const int64_t head = kv_head * group + r % group;
    const int64_t at = row * args.q.row_stride + head * args.q.head_stride;
    const char *from = static_cast<const char *>(args.q.data) + at * size_of(args.dtype);
    load_row(to, from, args.dtype, head_dim);
    for (int64_t d = 0; d < width; d += kLanes)
      store(to + d, load(to + d) * (args.scale * kLog2E));
  }

  void begin() const {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t position = args.positions[item.first_row + r / group];
      w.visible[r] = static_cast<int32_t>(
          max(0, min(item.num_keys, position + 1 - item.first_position)));
      w.top[r] = -1e30f; // below any score, and finite: masked scores are infinitely below it
      w.sum[r] = 0;
    }
    memset(acc, 0, rows * width * 4);
  }

  void finish() const {
    memcpy(job.partial_top + first_result, w.top, rows * 4);
    memcpy(job.partial_sum + first_result, w.sum, rows * 4);
  }

  // Few matrix rows. Scores of keys [0, count) from k on, to p[row][0:count]; what follows up to a
  // whole vector is undefined.
  void few_scores(const float *k, int64_t stride, int64_t count, float *p) const {
    for (int64_t c = 0; c < count; c += kLanes)
      for (int64_t r = 0; r < rows; ++r)
        store(p + r * kBlock + c, dot_products(w.q + r * width, k + c * stride, stride, width));
  }

  // acc += p v over keys [0, count) from v on.
  void few_sums(const float *v, int64_t stride, int64_t count, const float *p) const {
    for (int64_t r = 0; r < rows; r += kMicroRows)
      multiply_rows<Order::row_major>(
          {p + r * kBlock, kBlock, v, stride, acc + r * width, width, count, true},
          min(kMicroRows, rows - r), width);
  }

  // Scores of keys [c0, c1) to probabilities; acc and sum are brought to the new maximum.
  void few_softmax(int64_t c0, int64_t c1) const {
    for (int64_t r = 0; r < rows; ++r) {
      float *p = w.p + r * kBlock;
      Floats most = all(w.top[r]);
      const int64_t seen = w.visible[r] - c0;
      for (int64_t c = 0; c < c1 - c0; c += kLanes) {
        Floats x = load(p + c);
        if (c + kLanes > seen) {
          x = lane_numbers() < static_cast<int32_t>(seen - c) ? x : all(-__builtin_inff());
          store(p + c, x);
        }
        most = max(x, most);
      }
      const float top = largest_lane(most);
      const Floats factor = exp2(all(w.top[r] - top));
      Floats sum = Floats{};
      for (int64_t c = 0; c < c1 - c0; c += kLanes) {
        const Floats x = exp2(load(p + c) - top);
        store(p + c, x);
        sum += x;
      }
      w.sum[r] = w.sum[r] * factor[0] + sum_of_lanes(sum);
      w.top[r] = top;
      for (int64_t d = 0; d < width; d += kLanes)
        store(acc + r * width + d, load(acc + r * width + d) * factor);
    }
  }

  void attend_few() const {
    for (int64_t r = 0; r < rows; ++r) load_query(w.q + r * width, r);
    // Whole vectors of keys can be read in place.
    const bool in_place = args.dtype == Dtype::float32 && head_dim == width &&
                          args.page_size % kLanes == 0;
    const int64_t stride = args.kv.slot_stride;
    for (int64_t c0 = 0; c0 < item.num_keys; c0 += kBlock) {
      const int64_t c1 = min(c0 + kBlock, item.num_keys);
      if (!in_place) {
        pack(c0, c1);
        few_scores(w.k, width, c1 - c0, w.p);
        few_softmax(c0, c1);
        few_sums(w.v, width, c1 - c0, w.p);
        continue;
      }
      for (int64_t c = c0; c < c1;) {
        const Run run = run_at(c, c1);
        prefetch(c + kBlock);
        few_scores(reinterpret_cast<const float *>(run.k), stride, run.count, w.p + (c - c0));
        c += run.count;
      }
      few_softmax(c0, c1);
      for (int64_t c = c0; c < c1;) {
        const Run run = run_at(c, c1);
        few_sums(reinterpret_cast<const float *>(run.v), stride, run.count, w.p + (c - c0));
        c += run.count;
      }
    }
  }

  // Many matrix rows.
  void attend_many() const {
    for (int64_t first = 0; first < rows; first += kTileRows) {
      const int64_t n = min(kTileRows, rows - first);
      for (int64_t r = 0; r < n; ++r) load_query(w.q_rows + r * width, first + r);
      memset(w.q_rows + n * width, 0, (kTileRows - n) * width * 4);
      transpose(w.q + first * width, w.q_rows, kTileRows, width, 1);
      for (int64_t r = rows; r < first + kTileRows; ++r) w.visible[r] = 0;
    }
    for (int64_t c0 = 0; c0 < item.num_keys; c0 += kBlock) {
      const int64_t c1 = min(c0 + kBlock, item.num_keys);
      pack(c0, c1);
      for (int64_t first = 0; first < rows; first += kTileRows) attend_tile(first, c0, c1);
    }
  }

  // The matrix rows [first, first + kTileRows) and the packed keys [c0, c1).
  void attend_tile(int64_t first, int64_t c0, int64_t c1) const {
    const int64_t n = min(kTileRows, rows - first), lanes = padded(n);
    int64_t least = item.num_keys, most = 0; // keys that every row, that any row sees
    for (int64_t r = first; r < first + n; ++r) {
      least = min(least, w.visible[r]);
      most = max(most, w.visible[r]);
    }
    const int64_t count = min(c1, most) - c0;
    if (count <= 0) return;
    for (int64_t c = 0; c < count; c += kMicroRows)
      multiply_rows<Order::row_major>({w.k + c * width, width, w.q + first * width, kTileRows,
                                       w.p + c * kTileRows, kTileRows, head_dim, false},
                                      min(kMicroRows, count - c), lanes);
    for (int64_t lane = 0; lane < lanes; lane += kLanes)
      many_softmax(first + lane, w.p + lane, c0, count, c0 + count > least);
    for (int64_t r = first; r < first + n; ++r)
      for (int64_t d = 0; d < width; d += kLanes)
        store(acc + r * width + d, load(acc + r * width + d) * w.factor[r]);
    for (int64_t r = 0; r < n; r += kMicroRows)
      multiply_rows<Order::column_major>({w.p + r, kTileRows, w.v, width,
                                          acc + (first + r) * width, width, count, true},
                                         min(kMicroRows, n - r), width);
  }

  // Scores p[key * kTileRows] of the kLanes rows from `row` on to probabilities.
  TW_INLINE void many_softmax(int64_t row, float *p, int64_t c0, int64_t count,
                              bool masked) const {
    const Ints visible = load_as<Ints>(w.visible + row) - static_cast<int32_t>(c0);
    const Floats old_top = load(w.top + row);
    Floats top = old_top;
    for (int64_t c = 0; c < count; ++c) {
      Floats x = load(p + c * kTileRows);
      if (masked) {
        x = visible > static_cast<int32_t>(c) ? x : all(-__builtin_inff());
        store(p + c * kTileRows, x);
      }
      top = max(x, top);
    }
    Floats sum = Floats{};
    for (int64_t c = 0; c < count; ++c) {
      const Floats x = exp2(load(p + c * kTileRows) - top);
      store(p + c * kTileRows, x);
      sum += x;
    }
    const Floats factor = exp2(old_top - top);
    store(w.factor + row, factor);
    store(w.sum + row, load(w.sum + row) * factor + sum);
    store(w.top + row, top);
  }

  void run() const {
    begin();
    if (rows <= kFewRows)
      attend_few();
    else
      attend_many();
    finish();
  }
};

void attend(const void *job, int64_t index, int worker) { ItemTask(job, index, worker).run(); }

// The new key and value of a row to their slot.
void write(const void *context, int64_t row, int) {
  const TrieDecodeArgs &args = static_cast<const TrieDecodeJob *>(context)->args;
  const int64_t slot = args.slots[row], size = size_of(args.dtype);
  if (slot < 0) return; // padding
  const int64_t to = slot / args.page_size * args.kv.page_stride +
                     slot % args.page_size * args.kv.slot_stride;
  const auto copy = [&](void *pages, const Heads &x) {
    for (int64_t head = 0; head < args.kv_heads; ++head)
      memcpy(static_cast<char *>(pages) + (to + head * args.kv.head_stride) * size,
             static_cast<const char *>(x.data) +
                 (args.caller_rows[row] * x.row_stride + head * x.head_stride) * size,
             args.head_dim * size);
  };
  copy(args.kv.k, args.new_k);
  copy(args.kv.v, args.new_v);
}

void merge(const void *context, int64_t row, int worker) {
  const auto &job = *static_cast<const TrieDecodeJob *>(context);
  const TrieDecodeArgs &args = job.args;
  const int64_t group = args.heads / args.kv_heads, width = padded(args.head_dim);
  float *acc = reinterpret_cast<float *>(job.workspaces + worker * job.workspace_bytes);
  const int32_t *begin = args.merge_slots + args.merge_ptr[row];
  const int32_t *end = args.merge_slots + args.merge_ptr[row + 1];
  for (int64_t head = 0; head < args.heads; ++head) {
    const auto result = [&](int32_t slot) {
      return (head / group * args.partial_slots + slot) * group + head % group;
    };
    float top = -1e30f;
    for (const int32_t *slot = begin; slot < end; ++slot) {
      const float x = job.partial_top[result(*slot)];
      top = x > top ? x : top;
    }
    memset(acc, 0, width * 4);
    float sum = 0;
    for (const int32_t *slot = begin; slot < end; ++slot) {
      const int64_t r = result(*slot);
      const float weight = exp2(all(job.partial_top[r] - top))[0];
      sum += weight * job.partial_sum[r];
      for (int64_t d = 0; d < width; d += kLanes)
        store(acc + d, load(acc + d) + load(job.partial_out + r * width + d) * weight);
    }
    const int64_t at = args.caller_rows[row] * args.out.row_stride + head * args.out.head_stride;
    store_row(static_cast<char *>(args.out.data) + at * size_of(args.dtype), acc, args.dtype,
              args.head_dim, begin == end ? 0.0f : 1 / sum);
  }
}

} // namespace

const TrieDecodeKernels trie_decode = {padded, workspace_bytes, write, attend, merge};

} // namespace tw::TW_ISA
