// An item with many matrix rows: the time goes into multiply-adds. Matrix rows are in the lanes, so
// that softmax runs down the keys without any sum across lanes. V is packed a block of keys at a
// time; K is read in its pages where that can be.
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
  static constexpr int64_t kKeys = kPairs ? kPairBlock : kBlock; // of a block

  // The workspace in words. k: [kKeys][width / kValues]; v: [kKeys / kValues][width];
  // q: [tiles][width / kValues][kTileRows]; p: scores, float32 in any case, then probabilities
  // [kKeys / kValues][kTileRows]. What fills up a last pair is 0.
  Word *const k, *const v, *const q, *const p;
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  const float scale; // to scores that are exponents of 2; a soft cap makes them such itself

  explicit ManyRows(const ItemTask &task)
      : ItemTask(task), k(words(w.k)), v(words(w.v)), q(words(w.q)), p(words(w.p)),
        scale(args.softcap ? 1 : args.scale * kLog2E) {}

  static Word *words(float *x) { return reinterpret_cast<Word *>(x); }

  static int64_t count_words(int64_t values) { return (values + kValues - 1) / kValues; }

  void attend() const {
    for (int64_t first = 0; first < rows; first += kTileRows) load_tile(first);
    const int64_t begin = in_place() ? start / kMicroRows * kMicroRows : start;
    for (int64_t c0 = begin; c0 < item.num_keys; c0 += kKeys) {
      const int64_t c1 = min(c0 + kKeys, item.num_keys);
      const KeyRows keys = fetch(c0, c1);
      for (int64_t first = 0; first < rows; first += kTileRows) attend_tile(first, keys, c0, c1);
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

  // K of a block: row i of micro_rows[n] is key n * kMicroRows + i, `stride` words apart.
  struct KeyRows {
    const Word *micro_rows[(kKeys + kMicroRows - 1) / kMicroRows];
    int64_t stride;
    bool dirty; // hides_nonfinite: V has been rid of what is not finite
  };

  // Whether the words of K can be read where they lie, kMicroRows keys at a time.
  bool in_place() const {
    const PagedHeads &kv = args.kv;
    const bool are_words = (kPairs || args.dtype == Dtype::float32) && head_dim % kValues == 0 &&
                           (kv.page_stride | kv.slot_stride | kv.head_stride) % kValues == 0 &&
                           reinterpret_cast<uintptr_t>(kv.k) % sizeof(Word) == 0;
    return are_words && args.page_size % kMicroRows == 0;
  }

  // Keys [c0, c1): V to v; K to k, unless it can stay in place.
  KeyRows fetch(int64_t c0, int64_t c1) const {
    const char *k_at[kKeys], *v_at[kKeys];
    const int64_t stride = args.kv.slot_stride * size_of(args.dtype), count = c1 - c0;
    for (int64_t c = c0; c < c1;) {
      const Run run = run_at(c, c1);
      for (int64_t i = 0; i < run.count; ++i, ++c)
        k_at[c - c0] = run.k + i * stride, v_at[c - c0] = run.v + i * stride;
    }
    pack_v(v_at, count);
    const bool dirty = hides_nonfinite(c0, c1);
    if (dirty) keep_finite(v, count_words(count) * width);
    const bool stays = in_place();
    if (!stays) pack_k(k_at, count);
    KeyRows keys;
    keys.dirty = dirty;
    keys.stride = (stays ? args.kv.slot_stride : width) / kValues;
    for (int64_t c = 0; c < count; c += kMicroRows)
      keys.micro_rows[c / kMicroRows] =
          stays ? reinterpret_cast<const Word *>(k_at[c]) : k + c * keys.stride;
    return keys;
  }

  void pack_k(const char *const *rows_at, int64_t count) const {
    for (int64_t c = 0; c < count; ++c) {
      if constexpr (kPairs)
        for (int64_t d = 0; d < width; d += kLanes)
          store(k + (c * width + d) / 2, load_halves(rows_at[c] + d * 2, head_dim - d));
      else
        load_row(k + c * width, rows_at[c], args.dtype, head_dim);
    }
  }

  void pack_v(const char *const *rows_at, int64_t count) const {
    for (int64_t c = 0; c < count; c += kValues) {
      Word *to = v + c / kValues * width;
      if constexpr (kPairs)
        for (int64_t d = 0; d < width; d += kLanes) {
          const Halves none = {}, low = load_halves(rows_at[c] + d * 2, head_dim - d);
          const Halves high =
              c + 1 < count ? load_halves(rows_at[c + 1] + d * 2, head_dim - d) : none;
          store(to + d, __builtin_convertvector(low, Bits) |
                            __builtin_convertvector(high, Bits) << 16);
        }
      else
        load_row(to, rows_at[c], args.dtype, head_dim);
    }
  }

  // The matrix rows [first, first + kTileRows) and the keys [c0, c1).
  void attend_tile(int64_t first, const KeyRows &keys, int64_t c0, int64_t c1) const {
    const int64_t n = min(kTileRows, rows - first), lanes = padded(n);
    int64_t least = item.num_keys, most = 0; // keys that every row, that any row sees
    for (int64_t r = first; r < first + n; ++r) {
      least = min(least, w.visible[r]);
      most = max(most, w.visible[r]);
    }
    int64_t earliest = 0, latest = 0; // the first key that any row, that every row sees
    if (args.window) {
      earliest = item.num_keys;
      for (int64_t r = first; r < first + n; ++r) {
        earliest = min(earliest, w.first[r]);
        latest = max(latest, w.first[r]);
      }
    }
    const int64_t count = min(c1, most) - c0;
    if (count <= 0 || earliest >= c1) return;
    for (int64_t c = 0; c < count; c += kMicroRows) {
      if (c / kMicroRows % tiles == first / kTileRows) prefetch(c0 + kKeys + c, kMicroRows);
      multiply_rows<Order::row_major, Word>({keys.micro_rows[c / kMicroRows], keys.stride,
                                             q + first * width, kTileRows, w.p + c * kTileRows,
                                             kTileRows, count_words(head_dim), false},
                                            min(kMicroRows, count - c), lanes);
    }
    if (args.softcap) cap(count, lanes);
    if (c0 < latest) hide_before_window(first, c0, count, lanes);
    const bool masked = c0 + count > least;
    if (lanes == kTileRows)
      softmax<2>(first, c0, count, masked);
    else
      softmax<1>(first, c0, count, masked);
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
    if (keys.dirty) add_nonfinite(first, first + n, c0, c0 + count);
  }

  // Soft cap of the scores of `count` keys, which are exponents of 2 after it.
  void cap(int64_t count, int64_t lanes) const {
    const float most = args.softcap * kLog2E, factor = args.scale / args.softcap;
    for (int64_t c = 0; c < count; ++c)
      for (int64_t lane = 0; lane < lanes; lane += kLanes) {
        float *at = w.p + c * kTileRows + lane;
        store(at, tanh(load(at) * factor) * most);
      }
  }

  // Hides keys before the window of each row from it.
  void hide_before_window(int64_t first, int64_t c0, int64_t count, int64_t lanes) const {
    for (int64_t lane = 0; lane < lanes; lane += kLanes) {
      const Ints begin = load_as<Ints>(w.first + first + lane) - static_cast<int32_t>(c0);
      for (int64_t c = 0; c < count; ++c) {
        float *at = w.p + c * kTileRows + lane;
        store(at, begin > static_cast<int32_t>(c) ? all(-__builtin_inff()) : load(at));
      }
    }
  }

  // Scores of `count` keys from c0 on to probabilities, for V * kLanes rows from `row` on.
  template <int V> TW_INLINE void softmax(int64_t row, int64_t c0, int64_t count, bool masked) const {
    const Floats minus_infinity = all(-__builtin_inff()), to_exponents = all(scale);
    float *const s = w.p;
    Word *const to = p;
    Floats largest[V], top[V], sum[V]; // sum: of what the product with V sees, P after rounding
    for (int i = 0; i < V; ++i) {
      const Ints visible = load_as<Ints>(w.visible + row + i * kLanes) - static_cast<int32_t>(c0);
      for (int64_t c = 0; masked && c < count; ++c) {
        float *at = s + c * kTileRows + i * kLanes;
        store(at, visible > static_cast<int32_t>(c) ? load(at) : minus_infinity);
      }
      if (count % kValues) store(s + count * kTileRows + i * kLanes, minus_infinity);
      largest[i] = minus_infinity;
      sum[i] = Floats{};
    }
    for (int64_t c = 0; c < count; ++c)
#pragma GCC unroll 2
      for (int i = 0; i < V; ++i)
        largest[i] = max(load(s + c * kTileRows + i * kLanes), largest[i]);
#pragma GCC unroll 2
    for (int i = 0; i < V; ++i)
      top[i] = max(largest[i] * to_exponents, load(w.top + row + i * kLanes));
    for (int64_t c = 0; c < count; c += kValues)
#pragma GCC unroll 2
      for (int i = 0; i < V; ++i) {
        const auto exponent = [&](int64_t key) {
          return load(s + key * kTileRows + i * kLanes) * to_exponents - top[i];
        };
        Word *const at = to + c / kValues * kTileRows + i * kLanes;
        if constexpr (kPairs) {
          const Bits x = rounded_pairs(coarse_exp2(exponent(c)), coarse_exp2(exponent(c + 1)));
          store(at, x);
          sum[i] = multiply_add(x, all(kPairOfOnes), sum[i]);
        } else {
          const Floats x = exp2(exponent(c));
          store(at, x);
          sum[i] += x;
        }
      }
    for (int i = 0; i < V; ++i) {
      const int64_t r = row + i * kLanes;
      const Floats factor = exp2(load(w.top + r) - top[i]);
      store(w.factor + r, factor);
      store(w.sum + r, load(w.sum + r) * factor + sum[i]);
      store(w.top + r, top[i]);
    }
  }
};

} // namespace

} // namespace tw::TW_ISA
