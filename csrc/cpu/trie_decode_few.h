// An item with few matrix rows: the time goes into fetching keys. They are read where they lie,
// head dim in the lanes, and a score is a dot product.
#pragma once

#include "matmul.h"
#include "trie_decode_item.h"

namespace tw::TW_ISA {

namespace {

struct FewRows : ItemTask {
  explicit FewRows(const ItemTask &task) : ItemTask(task) {}

  // Keys [c0, c1) to w.k and w.v.
  void pack(int64_t c0, int64_t c1) const {
    const int64_t stride = args.kv.slot_stride * size_of(args.dtype);
    float *k = w.k, *v = w.v;
    for (int64_t c = c0; c < c1;) {
      const Run run = run_at(c, c1);
      prefetch(c + kBlock, kRun);
      for (int64_t i = 0; i < run.count; ++i, k += width, v += width) {
        load_row(k, run.k + i * stride, args.dtype, head_dim);
        load_row(v, run.v + i * stride, args.dtype, head_dim);
      }
      c += run.count;
    }
  }

  // Scores of keys [0, count) from k on, to p[row][0:count]; what follows up to a
  // whole vector is undefined.
  void scores(const float *k, int64_t stride, int64_t count, float *p) const {
    for (int64_t c = 0; c < count; c += kLanes)
      for (int64_t r = 0; r < rows; ++r)
        store(p + r * kBlock + c, dot_products(w.q + r * width, k + c * stride, stride, width));
  }

  // acc += p v over keys [0, count) from v on.
  void sums(const float *v, int64_t stride, int64_t count, const float *p) const {
    for (int64_t r = 0; r < rows; r += kMicroRows)
      multiply_rows<Order::row_major>(
          {p + r * kBlock, kBlock, v, stride, acc + r * width, width, count, true},
          min(kMicroRows, rows - r), width);
  }

  // Soft cap of the scores of `count` keys.
  void cap(int64_t count) const {
    const float most = args.softcap * kLog2E, inverse = 1 / most; // scores are exponents of 2
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < count; c += kLanes) {
        float *at = w.p + r * kBlock + c;
        store(at, tanh(load(at) * inverse) * most);
      }
  }

  // Hides keys before the window of each row from it.
  void hide_before_window(int64_t c0, int64_t c1) const {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = c0; c < min(w.first[r], c1); c += kLanes) {
        float *at = w.p + r * kBlock + c - c0;
        const Ints hidden = lane_numbers() < static_cast<int32_t>(w.first[r] - c);
        store(at, hidden ? all(-__builtin_inff()) : load(at));
      }
  }

  // Scores of keys [c0, c1) to probabilities; acc and sum are brought to the new maximum.
  void softmax(int64_t c0, int64_t c1) const {
    if (args.softcap) cap(c1 - c0);
    if (c0 < full_begin) hide_before_window(c0, c1);
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

  void attend() const {
    for (int64_t r = 0; r < rows; ++r) {
      float *q = w.q + r * width;
      load_query(q, r);
      for (int64_t d = 0; d < width; d += kLanes)
        store(q + d, load(q + d) * (args.scale * kLog2E)); // scores are exponents of 2
    }
    // Whole vectors of keys can be read in place.
    const bool in_place = args.dtype == Dtype::float32 && head_dim == width &&
                          args.page_size % kLanes == 0;
    const int64_t stride = args.kv.slot_stride;
    for (int64_t c0 = in_place ? start / kLanes * kLanes : start; c0 < item.num_keys;
         c0 += kBlock) {
      const int64_t c1 = min(c0 + kBlock, item.num_keys);
      const bool dirty = hides_nonfinite(c0, c1);
      if (!in_place || dirty) {
        pack(c0, c1);
        scores(w.k, width, c1 - c0, w.p);
        softmax(c0, c1);
        if (dirty) keep_finite(w.v, (c1 - c0) * width);
        sums(w.v, width, c1 - c0, w.p);
        if (dirty) add_nonfinite(0, rows, c0, c1);
        continue;
      }
      for (int64_t c = c0; c < c1;) {
        const Run run = run_at(c, c1);
        prefetch(c + kBlock, kRun);
        scores(reinterpret_cast<const float *>(run.k), stride, run.count, w.p + (c - c0));
        c += run.count;
      }
      softmax(c0, c1);
      for (int64_t c = c0; c < c1;) {
        const Run run = run_at(c, c1);
        sums(reinterpret_cast<const float *>(run.v), stride, run.count, w.p + (c - c0));
        c += run.count;
      }
    }
  }
};

} // namespace

} // namespace tw::TW_ISA
