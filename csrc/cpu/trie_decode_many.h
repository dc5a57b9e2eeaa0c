// An item with many matrix rows: the time goes into multiply-adds. Keys are packed a block at a
// time and matrix rows are in the lanes, so that softmax runs down the keys without any sum across
// lanes.
//
// The inner dimension of both products, head dim and keys, is made of words: a float32, or a pair
// of bfloat16 values. Pairs take q, K and V as they come and round P; everything else is float32.
#pragma once

#include <type_traits>

#include "matmul.h"
#include "trie_decode_item.h"

namespace tw::TW_ISA {

namespace {

template <class Word> struct ManyRows : ItemTask {
  static constexpr bool kPairs = std::is_same_v<Word, Pair>;
  static constexpr int64_t kValues = kPairs ? 2 : 1; // in a word

  // The workspace in words. k: [kBlock][width / kValues]; v: [kBlock / kValues][width];
  // q: [tiles][width / kValues][kTileRows]; p: scores, float32 in any case, then probabilities
  // [kBlock / kValues][kTileRows]. What fills up a last pair is 0.
  Word *const k, *const v, *const q, *const p;
  const float scale; // to scores that are exponents of 2

  explicit ManyRows(const ItemTask &task)
      : ItemTask(task), k(words(w.k)), v(words(w.v)), q(words(w.q)), p(words(w.p)),
        scale(args.scale * kLog2E) {}

  static Word *words(float *x) { return reinterpret_cast<Word *>(x); }

  static int64_t count_words(int64_t values) { return (values + kValues - 1) / kValues; }

  void attend() const {
    for (int64_t first = 0; first < rows; first += kTileRows) load_tile(first);
    for (int64_t c0 = 0; c0 < item.num_keys; c0 += kBlock) {
      const int64_t c1 = min(c0 + kBlock, item.num_keys);
      if constexpr (kPairs)
        pack_pairs(c0, c1);
      else
        pack(c0, c1);
      for (int64_t first = 0; first < rows; first += kTileRows) attend_tile(first, c0, c1);
    }
  }

  void load_tile(int64_t first) const {
    const int64_t n = min(kTileRows, rows - first);
    for (int64_t r = 0; r < n; ++r) load_query(w.q_rows + r * width, first + r);
    memset(w.q_rows + n * width, 0, (kTileRows - n) * width * 4);
    for (int64_t r = rows; r < first + kTileRows; ++r) w.visible[r] = 0;
    float *tile = w.q + first * width;
    transpose(tile, w.q_rows, kTileRows, width, 1);
    if constexpr (kPairs)
      for (int64_t d = 0; d < width; d += 2)
        for (int64_t lane = 0; lane < kTileRows; lane += kLanes) {
          const float *from = tile + d * kTileRows + lane;
          store(tile + d / 2 * kTileRows + lane, rounded_pairs(load(from), load(from + kTileRows)));
        }
  }

  // Keys [c0, c1): K as it is, head dim in pairs; V in pairs of keys.
  void pack_pairs(int64_t c0, int64_t c1) const {
    const int64_t stride = args.kv.slot_stride * 2;
    for (int64_t c = c0; c < c1;) {
      const Run run = run_at(c, c1);
      prefetch(c + kBlock);
      for (int64_t i = 0; i < run.count; ++i, ++c)
        for (int64_t d = 0; d < width; d += kLanes) {
          store(k + ((c - c0) * width + d) / 2,
                load_halves(run.k + i * stride + d * 2, head_dim - d));
          const Bits x = __builtin_convertvector(
              load_halves(run.v + i * stride + d * 2, head_dim - d), Bits);
          Pair *to = v + (c - c0) / 2 * width + d;
          store(to, (c - c0) % 2 ? load(to) | x << 16 : x);
        }
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
    const int64_t key_words = width / kValues;
    for (int64_t c = 0; c < count; c += kMicroRows)
      multiply_rows<Order::row_major, Word>({k + c * key_words, key_words, q + first * width,
                                             kTileRows, w.p + c * kTileRows, kTileRows,
                                             count_words(head_dim), false},
                                            min(kMicroRows, count - c), lanes);
    for (int64_t lane = 0; lane < lanes; lane += kLanes)
      softmax(first + lane, w.p + lane, c0, count, c0 + count > least);
    for (int64_t r = first; r < first + n; ++r) {
      if (w.factor[r] == 1) continue; // mostly: a maximum seldom moves after the first blocks
      for (int64_t d = 0; d < width; d += kLanes)
        store(acc + r * width + d, load(acc + r * width + d) * w.factor[r]);
    }
    for (int64_t r = 0; r < n; r += kMicroRows)
      multiply_rows<Order::column_major, Word>({p + r, kTileRows, v, width,
                                                acc + (first + r) * width, width,
                                                count_words(count), true},
                                               min(kMicroRows, n - r), width);
  }

  // Scores s[key * kTileRows] of the kLanes rows from `row` on to probabilities.
  TW_INLINE void softmax(int64_t row, float *s, int64_t c0, int64_t count, bool masked) const {
    const Floats minus_infinity = all(-__builtin_inff());
    const Ints visible = load_as<Ints>(w.visible + row) - static_cast<int32_t>(c0);
    Floats largest = minus_infinity;
    for (int64_t c = 0; c < count; ++c) {
      Floats x = load(s + c * kTileRows);
      if (masked) {
        x = visible > static_cast<int32_t>(c) ? x : minus_infinity;
        store(s + c * kTileRows, x);
      }
      largest = max(x, largest);
    }
    if (count % kValues) store(s + count * kTileRows, minus_infinity);
    const Floats old_top = load(w.top + row), top = max(largest * scale, old_top);
    const auto exponent = [&](int64_t c) { return load(s + c * kTileRows) * scale - top; };
    Floats sum = Floats{}; // of what the product with V sees: of P after rounding
    for (int64_t c = 0; c < count; c += kValues) {
      if constexpr (kPairs) {
        const Bits x = rounded_pairs(coarse_exp2(exponent(c)), coarse_exp2(exponent(c + 1)));
        store(s + c / 2 * kTileRows, x);
        sum = multiply_add(x, all(kPairOfOnes), sum);
      } else {
        const Floats x = exp2(exponent(c));
        store(s + c * kTileRows, x);
        sum += x;
      }
    }
    const Floats factor = exp2(old_top - top);
    store(w.factor + row, factor);
    store(w.sum + row, load(w.sum + row) * factor + sum);
    store(w.top + row, top);
  }
};

} // namespace

} // namespace tw::TW_ISA
