// Forward: out and lse. A warpgroup owns 64 rows of one query head, and the KV blocks of their
// schedule row stream past the two of a thread block: scores by wgmma, softmax online in base 2, and while
// the softmax of one tile runs the product of the last one's probabilities with V.
//
// What bounds it: at head dim 128, 4 * D operations a pair of row and column in the tensor cores
// (2 * D each for Q K^T and P V) against one exponential, of which an SM does 16 a cycle; bytes of
// device memory do not matter, a K or V tile serving 128 rows.
#include "cuda/attention/device.h"

#ifndef TW_FORWARD_IN_TURNS // bench/candidates.py
#define TW_FORWARD_IN_TURNS 0
#endif
#ifndef TW_FORWARD_SHARERS // bench/candidates.py
#define TW_FORWARD_SHARERS 1
#endif

namespace tw::cuda {

// Blocks of a cluster. They take neighbouring tiles, query heads of one group at the same rows: the
// tiles of K and V that stream past are the same, and each block copies a share of them to all.
// The tiles of a group (row_tiles over KV heads) must be a multiple, in the grain of the launch.
template <int D> constexpr int kSharers = D == 128 ? TW_FORWARD_SHARERS : 1;

template <int D> __device__ int forward_tile(int round) {
  if constexpr (kSharers<D> == 1) return tile_of(round, gridDim.x, blockIdx.x);
  constexpr unsigned kBlocks = kSharers<D>;
  const int tiles = tile_of(round, gridDim.x / kBlocks, blockIdx.x / kBlocks);
  return tiles * static_cast<int>(kBlocks) + static_cast<int>(blockIdx.x % kBlocks);
}

// A tile of K or V, and its release.
template <int kRows, int D>
__device__ void load_streamed(const TensorMap &map, uint64_t &full, Bits *tile, int head, int row) {
  if constexpr (kSharers<D> == 1) load_tile<kRows, D>(map, full, tile, head, row);
  else load_shared_tile<kRows, D, kSharers<D>>(map, full, tile, head, row);
}
template <int D> __device__ void release_streamed(uint64_t &empty) {
  if constexpr (kSharers<D> == 1) release(empty);
  else release_in_cluster<kSharers<D>>(empty);
}

// Warpgroups start their products in turns, so that the softmax of one runs beside the products of
// the other. Both walk the same number of tiles. Barriers 3 and 4 of the block: a warpgroup waits
// for its own, at which the other one arrives.
template <bool kInTurns> struct Turns {
  int own;
  __device__ explicit Turns(int warpgroup) : own(3 + warpgroup) {
    if (warpgroup == 1) pass(); // the first turn is the other's
  }
  __device__ void wait() const {
    if constexpr (kInTurns) cutlass::arch::NamedBarrier::sync(kConsumers * 128, own);
  }
  __device__ void pass() const {
    if constexpr (kInTurns) cutlass::arch::NamedBarrier::arrive(kConsumers * 128, 7 - own);
  }
  // No arrival is left at a barrier when the block ends.
  __device__ void end() const {
    if (own == 3) wait();
  }
};

template <int D, Grain kGrain>
__device__ void init_barriers(ForwardShared<D, kGrain> &shared) {
  for (int w = 0; w < kConsumers; ++w) {
    init(shared.q_full[w], 1);
    init(shared.q_empty[w], kWarpArrivals / kConsumers);
  }
  for (int s = 0; s < shared.kStream.stages; ++s) {
    init(shared.k_full[s], 1), init(shared.k_empty[s], kWarpArrivals * kSharers<D>);
    init(shared.v_full[s], 1), init(shared.v_empty[s], kWarpArrivals * kSharers<D>);
  }
}

template <int D, Grain kGrain>
__device__ void produce(const ForwardArguments &a, ForwardShared<D, kGrain> &shared) {
  constexpr Stream kStream = forward_stream(D, kGrain);
  Ring<kStream.stages> k_ring, v_ring;
  const auto load_k = [&](int head, int row) {
    uint64_t &full = shared.k_full[k_ring.stage];
    wait(shared.k_empty[k_ring.stage], k_ring.parity ^ 1);
    arrive_expecting(full, sizeof(shared.k[0]) + sizeof(shared.ends[0]));
    load_streamed<kStream.rows, D>(a.k, full, shared.k[k_ring.stage], head, row);
    load_numbers<kStream.rows>(a.ends + row, full, shared.ends[k_ring.stage]);
    k_ring.advance();
  };
  const auto load_v = [&](int head, int row) {
    uint64_t &full = shared.v_full[v_ring.stage];
    wait(shared.v_empty[v_ring.stage], v_ring.parity ^ 1);
    arrive_expecting(full, sizeof(shared.v[0]));
    load_streamed<kStream.rows, D>(a.v, full, shared.v[v_ring.stage], head, row);
    v_ring.advance();
  };
  for (int round = 0, tile; (tile = forward_tile<D>(round)) < a.tiles; ++round) {
    const RowTile t = row_tile(kGrain, a.rows, a.kv_heads, a.group, tile);
    for (int w = 0; w < kConsumers; ++w) {
      wait(shared.q_empty[w], round % 2 ^ 1);
      arrive_expecting(shared.q_full[w], sizeof(shared.q[w]));
      load_tile<kWarpgroupRows, D>(a.q, shared.q_full[w], shared.q[w], t.head(w), t.row(w));
    }
    // In the order in which the consumers need them: a V after the K of the next block.
    int row = a.rows.kv_blocks[t.begin] * kStream.rows;
    load_k(t.kv_head, row);
    for (int i = t.begin + 1; i < t.end; ++i) {
      const int next = a.rows.kv_blocks[i] * kStream.rows;
      load_k(t.kv_head, next);
      load_v(t.kv_head, row);
      row = next;
    }
    load_v(t.kv_head, row);
  }
}

template <class Element, int D, Grain kGrain>
__device__ void consume(const ForwardArguments &a, ForwardShared<D, kGrain> &shared,
                        unsigned warpgroup) {
  static_assert(tiles_are_the_copy_engines<Element, D>());
  constexpr Stream kStream = forward_stream(D, kGrain);
  using Scores = SharedProduct<Element, kStream.rows, D>;
  using Output = RegisterProduct<Element, D, kStream.rows>;
  using TileRows = TileLayout<Element, kStream.rows, D, kStream.stages>;
  using TileColumns = TransposedLayout<Element, kStream.rows, D, kStream.stages>;
  const auto q = left_operand<Scores, OwnTiles<Element, D>>(shared.q[0]);
  const auto k = right_operand<Scores, TileRows>(shared.k[0]);
  const auto v = right_operand<Output, TileColumns>(shared.v[0]);

  const Turns<TW_FORWARD_IN_TURNS> turns(warpgroup);
  Ring<kStream.stages> k_ring, v_ring;
  for (int round = 0, tile; (tile = forward_tile<D>(round)) < a.tiles; ++round) {
    const RowTile t = row_tile(kGrain, a.rows, a.kv_heads, a.group, tile);
    const int head = t.head(warpgroup), first_row = t.row(warpgroup);
    const int row = first_row + product_row(threadIdx.x % 128, 0);
    Softmax softmax;
    Fragment<kStream.rows> s;
    Operand<Element, kStream.rows> p;
    Fragment<D> out;

    const auto wait_for_k = [&] { wait(shared.k_full[k_ring.stage], k_ring.parity); };
    const auto start_scores = [&] {
      start(Scores{}, q(_, _, _, warpgroup), k(_, _, _, k_ring.stage), s, Into::zero);
    };
    const auto start_output = [&](Into into) {
      wait(shared.v_full[v_ring.stage], v_ring.parity);
      start(Output{}, p, v(_, _, _, v_ring.stage), out, into);
    };
    const auto mask = [&](int i) {
      if (i >= t.partial)
        hide(s, row, a.rows.kv_blocks[i] * kStream.rows, shared.ends[k_ring.stage]);
      release_streamed<D>(shared.k_empty[k_ring.stage]);
      k_ring.advance();
    };

    wait(shared.q_full[warpgroup], round % 2);
    wait_for_k();
    start_scores();
    finish<0>(s);
    mask(t.begin);
    softmax.update(s, a.scale_log2);
    narrow(s, p);
    if (t.begin + 1 < t.end) wait_for_k();
    for (int i = t.begin + 1; i < t.end; ++i) {
      turns.wait();
      start_scores();
      start_output(i == t.begin + 1 ? Into::zero : Into::sum);
      turns.pass();
      finish<1>(s);
      mask(i);
      const float2 shrink = softmax.update(s, a.scale_log2);
      compute_now(s);
      if (i + 1 < t.end) wait_for_k();
      finish<0>(out);
      release_streamed<D>(shared.v_empty[v_ring.stage]);
      v_ring.advance();
      scale_rows(out, shrink);
      narrow(s, p);
    }
    release(shared.q_empty[warpgroup]);
    start_output(t.end == t.begin + 1 ? Into::zero : Into::sum);
    finish<0>(out);
    release_streamed<D>(shared.v_empty[v_ring.stage]);
    v_ring.advance();

    const float sums[2] = {softmax.total(0), softmax.total(1)};
    scale_rows(out, {1 / sums[0], 1 / sums[1]}); // rows beyond N: NaN, not stored
    store_tile<Element, D>(a.out, shared.out[warpgroup], out, head, first_row);
    for (int h = 0; h < 2; ++h)
      if (threadIdx.x % 4 == 0 && row + 8 * h < a.tokens)
        a.lse[static_cast<int64_t>(head) * a.tokens + row + 8 * h] =
            (softmax.max[h] + log2f(sums[h])) * kLn2;
  }
  turns.end();
}

} // namespace tw::cuda

#if TW_FORWARD_SHARERS > 1
#define TW_CLUSTER(D) __cluster_dims__(tw::cuda::kSharers<D>)
#else
#define TW_CLUSTER(D)
#endif
#define TW_KERNEL(DTYPE, ELEMENT, D, GRAIN)                                                        \
  extern "C" __global__ void TW_CLUSTER(D) __launch_bounds__(tw::cuda::kThreads, 1)                \
      trie_attention_forward_##DTYPE##_##D##_##GRAIN(                                              \
          const __grid_constant__ tw::cuda::ForwardArguments arguments) {                          \
    tw::cuda::run<ELEMENT, tw::cuda::ForwardShared<D, tw::cuda::Grain::GRAIN>,                     \
                  tw::cuda::kSharers<D>>(arguments);                                               \
  }
#define TW_KERNELS(DTYPE, ELEMENT)                                                                 \
  TW_KERNEL(DTYPE, ELEMENT, 64, coarse)                                                            \
  TW_KERNEL(DTYPE, ELEMENT, 64, fine)                                                              \
  TW_KERNEL(DTYPE, ELEMENT, 128, coarse)                                                           \
  TW_KERNEL(DTYPE, ELEMENT, 128, fine)

TW_KERNELS(bfloat16, cutlass::bfloat16_t)
TW_KERNELS(float16, cutlass::half_t)
