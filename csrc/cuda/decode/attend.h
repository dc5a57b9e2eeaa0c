// The warpgroups of `attend` that multiply: 64 matrix rows of a unit with all keys of its item.
// Device code.
#pragma once

#include "cuda/decode/shared.h"
#include "cuda/decode/trie_decode.h"
#include "cuda/hopper/barrier.h"
#include "cuda/hopper/product.h"
#include "cuda/hopper/softmax.h"

namespace tw::cuda {

// Normalises the thread's two rows and puts them where they go.
template <class Element, int D, class Sums>
__device__ void store_rows(const AttendArguments &a, const Sums &sums, const Softmax &softmax,
                           const int64_t (&results)[2], int rows) {
  const int thread = threadIdx.x % kWarpgroupThreads;
  CUTE_UNROLL
  for (int r = 0; r < 2; ++r) {
    const float sum = softmax.total(r); // of four threads: before any of them leaves
    if (product_row(thread, 2 * r) >= rows) continue;
    const bool is_only_one = results[r] < 0;
    const int64_t result = is_only_one ? ~results[r] : results[r];
    Element *to = static_cast<Element *>(is_only_one ? a.out : a.partial_out) + result * D;
    const float inverse = sum == 0 ? 0 : 1 / sum;
    using Pair = cutlass::AlignedArray<Element, 2>;
    CUTE_UNROLL
    for (int i = 2 * r; i < size(sums); i += 4) {
      // 0 x NaN is NaN, too, and a row that sees no key must not have it from those that do.
      cutlass::Array<float, 2> wide;
      wide[0] = sum == 0 ? 0 : sums(i) * inverse, wide[1] = sum == 0 ? 0 : sums(i + 1) * inverse;
      Pair pair;
      static_cast<cutlass::Array<Element, 2> &>(pair) =
          cutlass::NumericArrayConverter<Element, float, 2>::convert(wide);
      *reinterpret_cast<Pair *>(to + product_column(thread, i)) = pair;
    }
    if (!is_only_one && thread % 4 == 0)
      a.partial_lse[result] = sum == 0 ? -INFINITY : softmax.max[r] + log2f(sum);
  }
}

// While the softmax of one tile runs, so does the product of the last one's probabilities with V.
template <class Element, int D>
__device__ void attend(const AttendArguments &a, AttendShared<D> &shared, int warpgroup) {
  constexpr int kSlots = AttendShared<D>::kSlots;
  using Scores = SharedProduct<Element, kTileKeys, D>;
  using Output = RegisterProduct<Element, D, kTileKeys>;
  const auto q = left_operand<Scores, TileLayout<Element, kWarpgroupRows, D, kRowWarpgroups>>(
      shared.q[0]);
  const auto k = right_operand<Scores, TileLayout<Element, kTileKeys, D, kSlots>>(shared.tiles[0]);
  const auto v =
      right_operand<Output, TransposedLayout<Element, kTileKeys, D, kSlots>>(shared.tiles[0]);
  const int thread = threadIdx.x % kWarpgroupThreads;

  for (Ring<1> ring;; ring.advance()) {
    wait(shared.part_full[warpgroup], ring.parity);
    const Part part = shared.parts[warpgroup];
    if (part.keys == 0) return;
    int visible[2];
    int64_t results[2];
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      visible[r] = shared.visible[warpgroup][product_row(thread, 2 * r)];
      results[r] = shared.results[warpgroup][product_row(thread, 2 * r)];
    }
    const int least = __reduce_min_sync(~0u, min(visible[0], visible[1]));
    const int tiles = (part.keys + kTileKeys - 1) / kTileKeys;

    Softmax softmax;
    Fragment<kTileKeys> s;
    Operand<Element, kTileKeys> p;
    Fragment<D> out;

    const auto k_at = [&](int i) { return Ring<kSlots>::at(part.turn + 2 * i); };
    const auto v_at = [&](int i) { return Ring<kSlots>::at(part.turn + 2 * i + 1); };
    const auto drop = [&](int slot) {
      arrive_of_warp(shared.tile_empty[slot], part.is_wide ? 1 : kRowWarpgroups);
    };
    const auto wait_for_k = [&](int i) { wait(shared.tile_full[k_at(i).stage], k_at(i).parity); };
    const auto start_scores = [&](int i) {
      start(Scores{}, q(_, _, _, warpgroup), k(_, _, _, k_at(i).stage), s, Into::zero);
    };
    const auto start_output = [&](int i) {
      wait(shared.tile_full[v_at(i).stage], v_at(i).parity);
      start(Output{}, p, v(_, _, _, v_at(i).stage), out, i == 0 ? Into::zero : Into::sum);
    };
    // Beyond the last key the tile has whatever the page or the ring had, and 0 x NaN is NaN.
    const auto clear_rest_of_values = [&] {
      const int first = part.keys - (tiles - 1) * kTileKeys;
      if (first == kTileKeys) return;
      const auto [slot, parity] = v_at(tiles - 1);
      wait(shared.tile_full[slot], parity);
      const int threads = part.is_wide ? kRowWarpgroups * kWarpgroupThreads : kWarpgroupThreads;
      constexpr int kChunks = D / kChunkColumns;
      for (int i = threadIdx.x % threads; i < (kTileKeys - first) * kChunks; i += threads)
        *reinterpret_cast<uint4 *>(
            &shared.tiles[slot][key_chunk_offset(first + i / kChunks, i % kChunks)]) = {0, 0, 0, 0};
      publish();
      cutlass::arch::NamedBarrier::sync(threads, part.is_wide ? 0 : 1 + warpgroup);
    };
    const auto mask = [&](int i) {
      drop(k_at(i).stage);
      if ((i + 1) * kTileKeys <= least) return;
      CUTE_UNROLL
      for (int e = 0; e < size(s); ++e)
        if (i * kTileKeys + product_column(thread, e) >= visible[e / 2 % 2]) s(e) = -INFINITY;
    };

    wait_for_k(0);
    start_scores(0);
    finish<0>(s);
    mask(0);
    softmax.update(s, a.scale_log2);
    narrow(s, p);
    if (tiles > 1) wait_for_k(1);
    for (int i = 1; i < tiles; ++i) {
      start_scores(i);
      start_output(i - 1);
      finish<1>(s);
      mask(i);
      const float2 shrink = softmax.update(s, a.scale_log2);
      compute_now(s);
      if (i + 1 < tiles) wait_for_k(i + 1);
      finish<0>(out);
      drop(v_at(i - 1).stage);
      scale_rows(out, shrink);
      narrow(s, p);
    }
    release(shared.part_empty[warpgroup]);
    clear_rest_of_values();
    start_output(tiles - 1);
    finish<0>(out);
    drop(v_at(tiles - 1).stage);
    store_rows<Element, D>(a, out, softmax, results, part.rows);
  }
}

} // namespace tw::cuda
