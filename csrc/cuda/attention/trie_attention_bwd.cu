// Backward: delta; dQ; dK with dV. With P = exp(scale * Q K^T - lse), delta = rowsum(dO * O) and
// dS = P * (dO V^T - delta): dQ = scale * dS K, dK = scale * dS^T Q, dV = P^T dO. Every element of
// a gradient is summed by one warpgroup in the order of its schedule, without atomics: two runs
// agree to the last bit.
//
// What bounds it: 14 * D operations a pair of row and column in the tensor cores (three products of
// 2 * D for dQ, four for dK and dV: the scores and dO V^T are computed twice, which is the price of
// having no atomics), against two exponentials.
#include "cuda/attention/device.h"

#ifndef TW_DKV_RUNS_ON // bench/candidates.py
#define TW_DKV_RUNS_ON 0
#endif

namespace tw::cuda {

// A row is read by D / 8 neighbouring threads, 16 bytes each.
template <class Element, int D> __device__ void delta(const DeltaArguments &a) {
  constexpr int kLanes = D / kChunkColumns, kRows = delta_rows(D);
  static_assert(kPadding % kRows == 0);
  const int blocks_per_head = a.padded / kRows;
  const int head = blockIdx.x / blocks_per_head;
  const int row = blockIdx.x % blocks_per_head * kRows + threadIdx.x / kLanes;
  const int lane = threadIdx.x % kLanes;
  float sum = 0;
  if (row < a.tokens) {
    const auto read = [&](const Heads &x) {
      return *reinterpret_cast<const cutlass::AlignedArray<Element, 8> *>(
          static_cast<const Element *>(x.data) + row * x.row_stride + head * x.head_stride +
          lane * 8);
    };
    const auto dout = read(a.dout), out = read(a.out);
    CUTE_UNROLL
    for (int e = 0; e < 8; ++e) sum += static_cast<float>(dout[e]) * static_cast<float>(out[e]);
  }
  CUTE_UNROLL
  for (int distance = kLanes / 2; distance > 0; distance /= 2)
    sum += __shfl_xor_sync(~0u, sum, distance);
  if (lane != 0) return;
  const int64_t at = static_cast<int64_t>(head) * a.padded + row;
  a.delta[at] = sum;
  a.lse2[at] =
      row < a.tokens ? a.lse[static_cast<int64_t>(head) * a.tokens + row] * kLog2E : 0.0f;
}

template <class Shared> __device__ void init_barriers(Shared &shared) {
  for (int w = 0; w < kConsumers; ++w) {
    init(shared.own_full[w], 1);
    init(shared.own_empty[w], kWarpArrivals / kConsumers);
  }
  for (int s = 0; s < Shared::kStream.stages; ++s)
    init(shared.full[s], 1), init(shared.empty[s], kWarpArrivals);
}

// ---- dQ: 64 rows of one query head a warpgroup, the KV blocks of their schedule row streaming past

template <int D, Grain kGrain>
__device__ void produce(const DqArguments &a, DqShared<D, kGrain> &shared) {
  constexpr Stream kStream = dq_stream(D, kGrain);
  Ring<kStream.stages> ring;
  for (int round = 0, tile; (tile = tile_of(round, gridDim.x, blockIdx.x)) < a.tiles; ++round) {
    const RowTile t = row_tile(kGrain, a.rows, a.kv_heads, a.group, tile);
    for (int w = 0; w < kConsumers; ++w) {
      uint64_t &full = shared.own_full[w];
      wait(shared.own_empty[w], round % 2 ^ 1);
      arrive_expecting(full, sizeof(shared.q[w]) + sizeof(shared.dout[w]));
      load_tile<kWarpgroupRows, D>(a.q, full, shared.q[w], t.head(w), t.row(w));
      load_tile<kWarpgroupRows, D>(a.dout, full, shared.dout[w], t.head(w), t.row(w));
    }
    for (int i = t.begin; i < t.end; ++i) {
      const int s = ring.stage, column = a.rows.kv_blocks[i] * kStream.rows;
      uint64_t &full = shared.full[s];
      wait(shared.empty[s], ring.parity ^ 1);
      arrive_expecting(full, sizeof(shared.k[s]) + sizeof(shared.v[s]) + sizeof(shared.ends[s]));
      load_tile<kStream.rows, D>(a.k, full, shared.k[s], t.kv_head, column);
      load_tile<kStream.rows, D>(a.v, full, shared.v[s], t.kv_head, column);
      load_numbers<kStream.rows>(a.ends + column, full, shared.ends[s]);
      ring.advance();
    }
  }
}

template <class Element, int D, Grain kGrain>
__device__ void consume(const DqArguments &a, DqShared<D, kGrain> &shared, unsigned warpgroup) {
  static_assert(tiles_are_the_copy_engines<Element, D>());
  constexpr Stream kStream = dq_stream(D, kGrain);
  using Scores = SharedProduct<Element, kStream.rows, D>;
  using Gradient = RegisterProduct<Element, D, kStream.rows>;
  const int thread = threadIdx.x % 128;
  using TileRows = TileLayout<Element, kStream.rows, D, kStream.stages>;
  using TileColumns = TransposedLayout<Element, kStream.rows, D, kStream.stages>;
  const auto q = left_operand<Scores, OwnTiles<Element, D>>(shared.q[0]);
  const auto dout = left_operand<Scores, OwnTiles<Element, D>>(shared.dout[0]);
  const auto k = right_operand<Scores, TileRows>(shared.k[0]);
  const auto v = right_operand<Scores, TileRows>(shared.v[0]);
  const auto k_columns = right_operand<Gradient, TileColumns>(shared.k[0]);

  Ring<kStream.stages> ring, running; // running: the stage that the last product reads
  for (int round = 0, tile; (tile = tile_of(round, gridDim.x, blockIdx.x)) < a.tiles; ++round) {
    const RowTile t = row_tile(kGrain, a.rows, a.kv_heads, a.group, tile);
    const int head = t.head(warpgroup), first_row = t.row(warpgroup);
    const int row = first_row + product_row(thread, 0);
    const int64_t at = static_cast<int64_t>(head) * a.padded + row;
    const float lse2[2] = {a.lse2[at], a.lse2[at + 8]};
    const float delta[2] = {a.delta[at], a.delta[at + 8]};
    Fragment<kStream.rows> s, dp;
    Operand<Element, kStream.rows> ds;
    Fragment<D> dq;

    wait(shared.own_full[warpgroup], round % 2);
    const auto own_q = q(_, _, _, warpgroup), own_dout = dout(_, _, _, warpgroup);
    wait(shared.full[ring.stage], ring.parity);
    for (int i = t.begin; i < t.end; ++i) {
      const int stage = ring.stage;
      start(Scores{}, own_q, k(_, _, _, stage), s, Into::zero);
      start(Scores{}, own_dout, v(_, _, _, stage), dp, Into::zero);
      if (i > t.begin) {
        finish<2>(dq);
        release(shared.empty[running.stage]);
        running.advance();
      }
      finish<1>(s);
      if (i >= t.partial)
        hide(s, row, a.rows.kv_blocks[i] * kStream.rows, shared.ends[stage]);
      CUTE_UNROLL
      for (int e = 0; e < size(s); ++e)
        s(e) = exp2_approximate(fmaf(s(e), a.scale_log2, -lse2[e / 2 % 2]));
      compute_now(s);
      ring.advance();
      if (i + 1 < t.end) wait(shared.full[ring.stage], ring.parity);
      finish<0>(dp);
      CUTE_UNROLL
      for (int e = 0; e < size(s); ++e) dp(e) = s(e) * (dp(e) - delta[e / 2 % 2]);
      narrow(dp, ds);
      start(Gradient{}, ds, k_columns(_, _, _, stage), dq,
            i == t.begin ? Into::zero : Into::sum);
    }
    release(shared.own_empty[warpgroup]);
    finish<0>(dq);
    release(shared.empty[running.stage]);
    running.advance();
    CUTE_UNROLL
    for (int e = 0; e < size(dq); ++e) dq(e) *= a.scale;
    store_tile<Element, D>(a.dq, shared.dq[warpgroup], dq, head, first_row);
  }
}

// ---- dK and dV: 128 columns of one KV head, the rows that see them streaming past, query head
// after query head of the group. Scores stand transposed, so that P^T and dS^T are left operands in
// registers.

// The scores of columns `column` and column + 8 that the trie hides become -inf.
template <class Scores>
__device__ void hide_transposed(Scores &s, int first_row, int column, const int (&ends)[2]) {
  CUTE_UNROLL
  for (int e = 0; e < size(s); ++e) {
    const int h = e / 2 % 2, row = first_row + product_column(threadIdx.x, e);
    if (!visible(row, column + 8 * h, ends[h])) s(e) = -INFINITY;
  }
}

template <int D, Grain kGrain>
__device__ void produce(const DkvArguments &a, DkvShared<D, kGrain> &shared) {
  constexpr Stream kStream = dkv_stream(D);
  Ring<kStream.stages> ring;
  for (int round = 0, tile; (tile = tile_of(round, gridDim.x, blockIdx.x)) < a.tiles; ++round) {
    const ColumnTile t = column_tile(kGrain, a.columns, a.kv_heads, tile);
    for (int w = 0; w < kConsumers; ++w) {
      uint64_t &full = shared.own_full[w];
      const int column = t.first_column + w * kWarpgroupRows;
      wait(shared.own_empty[w], round % 2 ^ 1);
      arrive_expecting(full, sizeof(shared.k[w]) + sizeof(shared.v[w]));
      load_tile<kWarpgroupRows, D>(a.k, full, shared.k[w], t.kv_head, column);
      load_tile<kWarpgroupRows, D>(a.v, full, shared.v[w], t.kv_head, column);
    }
    for (int head = t.kv_head * a.group; head < (t.kv_head + 1) * a.group; ++head)
      for (int block = t.first; block < t.last; ++block) {
        const int s = ring.stage, row = block * kStream.rows;
        const int64_t at = static_cast<int64_t>(head) * a.padded + row;
        uint64_t &full = shared.full[s];
        wait(shared.empty[s], ring.parity ^ 1);
        arrive_expecting(full, sizeof(shared.q[s]) + sizeof(shared.dout[s]) +
                                   sizeof(shared.lse2[s]) + sizeof(shared.delta[s]));
        load_tile<kStream.rows, D>(a.q, full, shared.q[s], head, row);
        load_tile<kStream.rows, D>(a.dout, full, shared.dout[s], head, row);
        load_numbers<kStream.rows>(a.lse2 + at, full, shared.lse2[s]);
        load_numbers<kStream.rows>(a.delta + at, full, shared.delta[s]);
        ring.advance();
      }
  }
}

template <class Element, int D, Grain kGrain>
__device__ void consume(const DkvArguments &a, DkvShared<D, kGrain> &shared, unsigned warpgroup) {
  static_assert(tiles_are_the_copy_engines<Element, D>());
  // Whether the last products run on while the next scores are started, as dQ's does: at 128 there
  // are no registers for it.
  constexpr bool kRunsOn = TW_DKV_RUNS_ON && D == 64;
  constexpr Stream kStream = dkv_stream(D);
  using Scores = SharedProduct<Element, kStream.rows, D>;
  using Gradient = RegisterProduct<Element, D, kStream.rows>;
  const int thread = threadIdx.x % 128;
  using TileRows = TileLayout<Element, kStream.rows, D, kStream.stages>;
  using TileColumns = TransposedLayout<Element, kStream.rows, D, kStream.stages>;
  const auto k = left_operand<Scores, OwnTiles<Element, D>>(shared.k[0]);
  const auto v = left_operand<Scores, OwnTiles<Element, D>>(shared.v[0]);
  const auto q = right_operand<Scores, TileRows>(shared.q[0]);
  const auto dout = right_operand<Scores, TileRows>(shared.dout[0]);
  const auto q_columns = right_operand<Gradient, TileColumns>(shared.q[0]);
  const auto dout_columns = right_operand<Gradient, TileColumns>(shared.dout[0]);

  Ring<kStream.stages> ring;
  for (int round = 0, tile; (tile = tile_of(round, gridDim.x, blockIdx.x)) < a.tiles; ++round) {
    const ColumnTile t = column_tile(kGrain, a.columns, a.kv_heads, tile);
    const RowRange range = t.range(a.columns, warpgroup);
    const int first_column = t.first_column + warpgroup * kWarpgroupRows;
    const int column = first_column + product_row(thread, 0);
    const int ends[2] = {a.ends[column], a.ends[column + 8]};
    Fragment<kStream.rows> s, dp;
    Operand<Element, kStream.rows> p, ds;
    Fragment<D> dk, dv;
    int running = -1; // the stage that the last products read, if they run on
    const auto finish_last = [&](auto left) {
      finish<left>(dk);
      warpgroup_fence_operand(dv);
      if (running >= 0) release(shared.empty[running]);
      running = -1;
    };

    wait(shared.own_full[warpgroup], round % 2);
    const auto own_k = k(_, _, _, warpgroup), own_v = v(_, _, _, warpgroup);
    Into into = Into::zero;
    for (int head = 0; head < a.group; ++head)
      for (int block = t.first; block < t.last; ++block) {
        wait(shared.full[ring.stage], ring.parity);
        if (kGrain == Grain::fine && !range.has(block)) {
          if constexpr (kRunsOn) finish_last(Int<0>{}); // or its stage would be waited for
          release(shared.empty[ring.stage]);
          ring.advance();
          continue;
        }
        start(Scores{}, own_k, q(_, _, _, ring.stage), s, Into::zero);
        start(Scores{}, own_v, dout(_, _, _, ring.stage), dp, Into::zero);
        if constexpr (kRunsOn) finish_last(Int<2>{});
        finish<1>(s);
        if (range.is_masked(block)) hide_transposed(s, block * kStream.rows, column, ends);
        const float *lse2 = shared.lse2[ring.stage], *delta = shared.delta[ring.stage];
        CUTE_UNROLL
        for (int e = 0; e < size(s); ++e)
          s(e) = exp2_approximate(fmaf(s(e), a.scale_log2, -lse2[product_column(thread, e)]));
        narrow(s, p);
        start(Gradient{}, p, dout_columns(_, _, _, ring.stage), dv, into);
        finish<1>(dp);
        CUTE_UNROLL
        for (int e = 0; e < size(s); ++e) dp(e) = s(e) * (dp(e) - delta[product_column(thread, e)]);
        narrow(dp, ds);
        start(Gradient{}, ds, q_columns(_, _, _, ring.stage), dk, into);
        into = Into::sum;
        if constexpr (kRunsOn) {
          running = ring.stage;
        } else {
          finish<0>(dk);
          warpgroup_fence_operand(dv);
          release(shared.empty[ring.stage]);
        }
        ring.advance();
      }
    if constexpr (kRunsOn) finish_last(Int<0>{});
    release(shared.own_empty[warpgroup]);
    CUTE_UNROLL
    for (int e = 0; e < size(dk); ++e) dk(e) *= a.scale;
    store_tile<Element, D>(a.dk, shared.dk[warpgroup], dk, t.kv_head, first_column);
    store_tile<Element, D>(a.dv, shared.dv[warpgroup], dv, t.kv_head, first_column);
  }
}

} // namespace tw::cuda

#define TW_DELTA(DTYPE, ELEMENT, D)                                                                \
  extern "C" __global__ void __launch_bounds__(tw::cuda::kDeltaThreads)                            \
      trie_attention_delta_##DTYPE##_##D(                                                          \
          const __grid_constant__ tw::cuda::DeltaArguments arguments) {                            \
    tw::cuda::delta<ELEMENT, D>(arguments);                                                        \
  }
#define TW_GRADIENTS(DTYPE, ELEMENT, D, GRAIN)                                                     \
  extern "C" __global__ void __launch_bounds__(tw::cuda::kThreads, 1)                              \
      trie_attention_dq_##DTYPE##_##D##_##GRAIN(                                                   \
          const __grid_constant__ tw::cuda::DqArguments arguments) {                               \
    tw::cuda::run<ELEMENT, tw::cuda::DqShared<D, tw::cuda::Grain::GRAIN>>(arguments);              \
  }                                                                                                \
  extern "C" __global__ void __launch_bounds__(tw::cuda::kThreads, 1)                              \
      trie_attention_dkv_##DTYPE##_##D##_##GRAIN(                                                  \
          const __grid_constant__ tw::cuda::DkvArguments arguments) {                              \
    tw::cuda::run<ELEMENT, tw::cuda::DkvShared<D, tw::cuda::Grain::GRAIN>>(arguments);             \
  }
#define TW_KERNELS(DTYPE, ELEMENT, D)                                                              \
  TW_DELTA(DTYPE, ELEMENT, D)                                                                      \
  TW_GRADIENTS(DTYPE, ELEMENT, D, coarse)                                                          \
  TW_GRADIENTS(DTYPE, ELEMENT, D, fine)

TW_KERNELS(bfloat16, cutlass::bfloat16_t, 64)
TW_KERNELS(bfloat16, cutlass::bfloat16_t, 128)
TW_KERNELS(float16, cutlass::half_t, 64)
TW_KERNELS(float16, cutlass::half_t, 128)
