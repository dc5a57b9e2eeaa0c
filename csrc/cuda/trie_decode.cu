// The decode kernels for sm_90a (trie_decode.h says what they do for one another).
//
// Which limit: a key and its value are 4 x head_dim bytes and take 4 x head_dim operations a matrix
// row. By the data sheet (3.35 TB/s, 989 TFLOP/s) memory is the limit up to some 300 rows, and the
// product of a tile with 64 rows takes a fifth of the time that the tile's fetch does. So few rows
// are padded to the 64 of a warpgroup's product, and one kernel serves all items. Above 64 rows two
// warpgroups share each tile, which halves what row blocks of one item fetch again from L2.
//
// A block is one item, KV head and block of matrix rows (query rows x query heads of the group).
// One warp fetches tiles of K and V in turn, K0 V0 K1 V1 ..., to a ring of slots in shared memory;
// every warpgroup multiplies its 64 rows with each of them and runs the softmax in registers.
#include <cuda_runtime.h>

#include <cute/tensor.hpp>
#include <cutlass/arch/barrier.h>
#include <cutlass/cutlass.h>
#include <cutlass/numeric_conversion.h>
#include <cutlass/numeric_types.h>

#include "cuda/trie_decode.h"
#include "cuda/trie_decode_index.h"

namespace tw::cuda {

namespace {

using namespace cute;
using Barrier = cutlass::arch::ClusterTransactionBarrier;

constexpr float kNoKeyYet = -1.0e30f; // finite: 2^(-inf - kNoKeyYet) is 0, never NaN
constexpr unsigned kWarp = 0xffffffff;

__device__ float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Until the barrier has completed the phase of this parity. No access moves above it.
__device__ void wait(uint64_t *barrier, int parity) {
  Barrier::wait(barrier, parity);
  asm volatile("" ::: "memory");
}

// Ordinary writes to shared memory before it are there for wgmma after the next barrier.
__device__ void publish_to_wgmma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ void sync_threads(int count) { cutlass::arch::NamedBarrier::sync(count, 0); }

// Of a tile [kTile, head_dim], and of a ring of tiles read as V^T: [head_dim, kTile, slots].
template <class Element, int kHeadDim>
using TileLayout = decltype(tile_to_shape(GMMA::Layout_K_SW128_Atom<Element>{},
                                          Shape<Int<kTile>, Int<kHeadDim>>{}));
template <class Element, int kHeadDim, int kSlots>
using RingLayout = decltype(tile_to_shape(GMMA::Layout_K_SW128_Atom<Element>{},
                                          Shape<Int<kTile>, Int<kHeadDim>, Int<kSlots>>{}));
template <class Element, int kHeadDim, int kSlots>
using TransposedRingLayout = decltype(composition(
    RingLayout<Element, kHeadDim, kSlots>{},
    make_layout(Shape<Int<kHeadDim>, Int<kTile>, Int<kSlots>>{},
                Stride<Int<kTile>, _1, Int<kTile * kHeadDim>>{})));

// Whether products read 16-byte chunks where chunk_offset has them; `element(row, column)` is where
// they read an element.
template <int kHeadDim, class Place> constexpr bool chunks_are_there(Place element) {
  for (int row = 0; row < kTile; ++row)
    for (int chunk = 0; chunk < kHeadDim / kChunkColumns; ++chunk)
      for (const int column : {0, kChunkColumns - 1})
        if (element(row, kChunkColumns * chunk + column) * kElementBytes !=
            chunk_offset(row, chunk) + column * kElementBytes)
          return false;
  return true;
}

template <class Element, int kHeadDim> constexpr bool tile_is_where_products_read_it() {
  decltype(as_position_independent_swizzle_layout(TileLayout<Element, kHeadDim>{})) layout{};
  return chunks_are_there<kHeadDim>(
      [=](int row, int column) { return static_cast<int>(layout(row, column)); });
}

template <class Element, int kHeadDim, int kSlots> constexpr bool ring_is_where_products_read_it() {
  decltype(as_position_independent_swizzle_layout(
      TransposedRingLayout<Element, kHeadDim, kSlots>{})) layout{};
  return chunks_are_there<kHeadDim>([=](int row, int column) {
    return static_cast<int>(layout(column, row, kSlots - 1)) - (kSlots - 1) * kTile * kHeadDim;
  });
}

// Rows of the block see at least and at most so many keys of the item. By whole warps.
struct KeyRange {
  int least, most;
};

__device__ KeyRange keys_of_rows(const PartialArguments &a, const DecodeItem &item, int first_row,
                                 int end_row) {
  int least = item.num_keys, most = 0;
  for (int row = first_row + threadIdx.x % 32; row < end_row; row += 32) {
    const int keys = visible_keys(item, a.positions[row]);
    least = min(least, keys), most = max(most, keys);
  }
  return {__reduce_min_sync(kWarp, least), __reduce_max_sync(kWarp, most)};
}

struct Ring {
  char *slots;
  uint64_t *full, *empty; // a slot is filled by bulk copies; each multiplying warp has released it
};

// The fetching warp: tile by tile the item's keys [0, num_keys), K in one turn of the ring and V in
// the next. A lane copies one box.
template <int kHeadDim, int kSlots>
__device__ void fetch(const PartialArguments &a, const DecodeItem &item, int head, int num_keys,
                      const Ring &ring) {
  const int lane = threadIdx.x % 32;
  const Box box = box_of_lane(lane, a.page_size);
  const int32_t *pages = a.pages + item.first_page;
  // Read a tile ahead. Negative: the lane has no keys to copy.
  const auto page_of_tile = [&](int first_key) {
    const int key = first_key + box.key;
    return box.strip * kBoxColumns < kHeadDim && key < num_keys ? pages[key / a.page_size] : -1;
  };
  int page = page_of_tile(0);
  for (int first_key = 0, turn = 0; first_key < num_keys; first_key += kTile) {
    const int next_page = page_of_tile(first_key + kTile);
    for (const TensorMap *map : {&a.k, &a.v}) {
      const int slot = ring_slot(turn, kSlots);
      wait(ring.empty + slot, released_parity(turn, kSlots));
      if (lane == 0)
        Barrier::arrive_and_expect_tx(
            ring.full + slot, arriving_bytes(num_keys - first_key, a.page_size, kHeadDim));
      __syncwarp();
      if (page >= 0)
        SM90_TMA_LOAD_4D::copy(map, ring.full + slot,
                               static_cast<uint64_t>(TMA::CacheHintSm90::EVICT_NORMAL),
                               ring.slots + slot * tile_bytes(kHeadDim) + box.offset(),
                               box.strip * kBoxColumns, head,
                               (first_key + box.key) % a.page_size, page);
      ++turn;
    }
    page = next_page;
  }
}

// The softmax of a thread's two rows so far. Sums are of this thread's columns only.
struct Softmax {
  float top[2] = {kNoKeyYet, kNoKeyYet}, sum[2] = {0, 0};

  // Takes a tile of scores and leaves 2^(score - top) in their place. `factor` brings what was
  // accumulated under the old top to the new one.
  template <class Scores>
  __device__ void step(Scores &scores, float scale_log2, float (&factor)[2]) {
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      float high = -INFINITY;
      CUTE_UNROLL
      for (int i = 2 * r; i < size(scores); i += 4)
        high = fmaxf(high, fmaxf(scores(i), scores(i + 1)));
      high = fmaxf(high, __shfl_xor_sync(kWarp, high, 1));
      high = fmaxf(high, __shfl_xor_sync(kWarp, high, 2));
      const float new_top = fmaxf(top[r], high * scale_log2);
      factor[r] = exp2_of(top[r] - new_top);
      top[r] = new_top;
      sum[r] *= factor[r];
      CUTE_UNROLL
      for (int i = 2 * r; i < size(scores); i += 4)
        CUTE_UNROLL
        for (int c = i; c < i + 2; ++c) {
          scores(c) = exp2_of(scores(c) * scale_log2 - new_top);
          sum[r] += scores(c);
        }
    }
  }

  __device__ float whole_sum(int r) const {
    const float pair = sum[r] + __shfl_xor_sync(kWarp, sum[r], 1);
    return pair + __shfl_xor_sync(kWarp, pair, 2);
  }
};

// A multiplying warpgroup: its tile of matrix rows [first_m, first_m + kTile) of the item, of which
// those below end_m exist. `threads`: of all warpgroups that multiply.
template <class Element, int kHeadDim, int kSlots>
__device__ void attend(const PartialArguments &a, const DecodeItem &item, int head, int first_m,
                       int end_m, KeyRange keys, int threads, char *q_tile, const Ring &ring) {
  const int thread = threadIdx.x % kWarpgroupThreads;
  const int query_heads = a.kv_heads * a.group;

  constexpr int kChunks = kHeadDim / kChunkColumns; // of a row
  for (int i = thread; i < kTile * kChunks; i += kWarpgroupThreads) {
    const int row = i / kChunks, chunk = i % kChunks, m = first_m + row;
    uint4 value = {0, 0, 0, 0};
    if (m < end_m) {
      const int64_t from = a.rows[item.first_row + row_of(m, a.group)] * a.q.row_stride +
                           head_of(m, a.group, head) * a.q.head_stride + chunk * kChunkColumns;
      value = *reinterpret_cast<const uint4 *>(static_cast<const Element *>(a.q.data) + from);
    }
    *reinterpret_cast<uint4 *>(q_tile + chunk_offset(row, chunk)) = value;
  }
  publish_to_wgmma();
  sync_threads(threads);

  int visible[2]; // keys of the thread's two rows
  for (int r = 0; r < 2; ++r) {
    const int m = first_m + product_row(thread, 2 * r);
    const int row = item.first_row + row_of(m, a.group);
    visible[r] = m < end_m ? visible_keys(item, a.positions[row]) : 0;
  }

  using KeyProduct = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float,
                           Shape<Int<kTile>, Int<kTile>, Int<kHeadDim>>>()));
  using ValueProduct = decltype(make_tiled_mma(
      GMMA::rs_op_selector<Element, Element, float, Shape<Int<kTile>, Int<kHeadDim>, Int<kTile>>,
                           GMMA::Major::K, GMMA::Major::MN>()));
  const auto ring_start = make_smem_ptr(reinterpret_cast<Element *>(ring.slots));
  const auto q = make_tensor(make_smem_ptr(reinterpret_cast<Element *>(q_tile)),
                             TileLayout<Element, kHeadDim>{});
  KeyProduct key_product;
  ValueProduct value_product;
  const auto key_thread = key_product.get_thread_slice(thread);
  const auto value_thread = value_product.get_thread_slice(thread);
  const auto q_part = key_thread.partition_fragment_A(q);
  const auto k_part = key_thread.partition_fragment_B(
      make_tensor(ring_start, RingLayout<Element, kHeadDim, kSlots>{}));
  const auto v_part = value_thread.partition_fragment_B(
      make_tensor(ring_start, TransposedRingLayout<Element, kHeadDim, kSlots>{}));
  auto scores = partition_fragment_C(key_product, Shape<Int<kTile>, Int<kTile>>{});
  auto sums = partition_fragment_C(value_product, Shape<Int<kTile>, Int<kHeadDim>>{});
  clear(sums);
  // The scores' fragment in pairs is the first operand of the second product, element by element.
  auto weights = make_tensor<Element>(Layout<Shape<Shape<_2, _2, _2>, _1, Int<kTile / 16>>>{});
  static_assert(size(weights) == size(scores));

  const auto multiply = [](auto &product, const auto &left, const auto &right, auto &to) {
    warpgroup_fence_operand(to);
    warpgroup_arrive();
    CUTE_UNROLL
    for (int k = 0; k < size<2>(left); ++k) {
      gemm(product, left(_, _, k), right(_, _, k), to);
      product.accumulate_ = GMMA::ScaleOut::One;
    }
    warpgroup_commit_batch();
    warpgroup_wait<0>();
    warpgroup_fence_operand(to);
  };
  const auto release = [&](int slot) {
    if (threadIdx.x % 32 == 0) Barrier::arrive(ring.empty + slot);
  };

  Softmax softmax;
  for (int first_key = 0, turn = 0; first_key < keys.most; first_key += kTile, turn += 2) {
    const int k_slot = ring_slot(turn, kSlots), v_slot = ring_slot(turn + 1, kSlots);
    wait(ring.full + k_slot, filled_parity(turn, kSlots));
    key_product.accumulate_ = GMMA::ScaleOut::Zero;
    multiply(key_product, q_part, k_part(_, _, _, k_slot), scores);
    release(k_slot);

    if (first_key + kTile > keys.least) {
      CUTE_UNROLL
      for (int i = 0; i < size(scores); ++i) {
        const int key = first_key + product_column(thread, i);
        if (key >= visible[i / 2 % 2]) scores(i) = -INFINITY;
      }
    }
    float factor[2];
    softmax.step(scores, a.scale_log2, factor);
    CUTE_UNROLL
    for (int i = 0; i < size(sums); ++i) sums(i) *= factor[i / 2 % 2];
    CUTE_UNROLL
    for (int i = 0; i < size(scores); i += 2) {
      const cutlass::Array<float, 2> pair{scores(i), scores(i + 1)};
      const auto rounded = cutlass::NumericArrayConverter<Element, float, 2>::convert(pair);
      weights(i) = rounded[0], weights(i + 1) = rounded[1];
    }

    wait(ring.full + v_slot, filled_parity(turn + 1, kSlots));
    if (first_key + kTile > keys.most) {
      // Beyond the last key the tile has whatever the page or the ring had, and 0 x NaN is NaN.
      const int first = keys.most - first_key, count = (kTile - first) * kChunks;
      for (int i = threadIdx.x; i < count; i += threads)
        *reinterpret_cast<uint4 *>(ring.slots + v_slot * tile_bytes(kHeadDim) +
                                   chunk_offset(first + i / kChunks, i % kChunks)) = {0, 0, 0, 0};
      publish_to_wgmma();
      sync_threads(threads);
    }
    value_product.accumulate_ = GMMA::ScaleOut::One;
    multiply(value_product, weights, v_part(_, _, _, v_slot), sums);
    release(v_slot);
  }

  CUTE_UNROLL
  for (int r = 0; r < 2; ++r) {
    const float sum = softmax.whole_sum(r);
    const int m = first_m + product_row(thread, 2 * r);
    if (m >= end_m) continue;
    const int64_t result = (int64_t{item.first_slot} + row_of(m, a.group)) * query_heads +
                           head_of(m, a.group, head);
    const float inverse = sum == 0 ? 0 : 1 / sum;
    CUTE_UNROLL
    for (int i = 2 * r; i < size(sums); i += 4) {
      // 0 x NaN is NaN, too, and a row that sees no key must not have it from those that do.
      const float2 pair = {sums(i) * inverse, sums(i + 1) * inverse};
      *reinterpret_cast<float2 *>(a.out + result * kHeadDim + product_column(thread, i)) =
          sum == 0 ? float2{0, 0} : pair;
    }
    if (thread % 4 == 0) a.lse[result] = sum == 0 ? -INFINITY : softmax.top[r] + log2f(sum);
  }
}

template <class Element, int kHeadDim, int kWarpgroups>
__device__ void partial(const PartialArguments &a) {
  constexpr int kSlots = ring_slots(kHeadDim, kWarpgroups);
  static_assert(tile_is_where_products_read_it<Element, kHeadDim>());
  static_assert(ring_is_where_products_read_it<Element, kHeadDim, kSlots>());
  extern __shared__ __align__(1024) char shared[]; // swizzled tiles start at multiples of 1024
  Ring ring;
  ring.slots = shared + kWarpgroups * tile_bytes(kHeadDim);
  ring.full = reinterpret_cast<uint64_t *>(ring.slots + kSlots * tile_bytes(kHeadDim));
  ring.empty = ring.full + kSlots;

  const Part part = part_of_block(blockIdx.x, a.row_blocks, a.kv_heads, kWarpgroups);
  const DecodeItem item = a.items[part.item];
  const int first_m = part.first_m;
  const int end_m = min((item.end_row - item.first_row) * a.group, first_m + kWarpgroups * kTile);
  if (first_m >= end_m) return;
  const KeyRange keys = keys_of_rows(a, item, item.first_row + row_of(first_m, a.group),
                                     item.first_row + row_of(end_m - 1, a.group) + 1);

  const int warpgroups = (end_m - first_m + kTile - 1) / kTile; // that have rows
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < kSlots; ++slot) {
      Barrier::init(ring.full + slot, 1);
      Barrier::init(ring.empty + slot, releases(warpgroups));
    }
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  const int warpgroup = cutlass::canonical_warp_group_idx();
  if (warpgroup == kWarpgroups) {
    fetch<kHeadDim, kSlots>(a, item, part.head, keys.most, ring);
  } else if (warpgroup < warpgroups) {
    attend<Element, kHeadDim, kSlots>(a, item, part.head, first_m + warpgroup * kTile, end_m, keys,
                                      warpgroups * kWarpgroupThreads,
                                      shared + warpgroup * tile_bytes(kHeadDim), ring);
  }
}

// One warp: a row and head.
template <class Element, int kHeadDim> __device__ void merge(const MergeArguments &a) {
  constexpr int kColumns = kHeadDim / 32; // of a lane
  const int lane = threadIdx.x % 32;
  const int index = blockIdx.x * (kMergeThreads / 32) + threadIdx.x / 32;
  const int row = index / a.heads, head = index % a.heads;
  if (row >= a.num_rows) return;
  const int first = a.merge_ptr[row], end = a.merge_ptr[row + 1];

  float top = kNoKeyYet;
  for (int i = first + lane; i < end; i += 32)
    top = fmaxf(top, a.partial_lse[int64_t{a.merge_slots[i]} * a.heads + head]);
  for (int step = 16; step; step /= 2) top = fmaxf(top, __shfl_xor_sync(kWarp, top, step));

  using Columns = cutlass::AlignedArray<float, kColumns>;
  Columns sums;
  sums.clear();
  float total = 0;
#pragma unroll 4
  for (int i = first; i < end; ++i) {
    const int64_t result = int64_t{a.merge_slots[i]} * a.heads + head;
    const float weight = exp2_of(a.partial_lse[result] - top);
    const Columns part =
        reinterpret_cast<const Columns *>(a.partial_out + result * kHeadDim)[lane];
    total += weight;
    CUTE_UNROLL
    for (int c = 0; c < kColumns; ++c) sums[c] += weight * part[c];
  }
  const float inverse = total == 0 ? 0 : 1 / total; // padding rows have nothing to merge
  CUTE_UNROLL
  for (int c = 0; c < kColumns; ++c) sums[c] *= inverse;
  using Rounded = cutlass::AlignedArray<Element, kColumns>;
  Rounded rounded;
  static_cast<cutlass::Array<Element, kColumns> &>(rounded) =
      cutlass::NumericArrayConverter<Element, float, kColumns>::convert(sums);
  Element *out = static_cast<Element *>(a.out) +
                 (int64_t{a.rows[row]} * a.heads + head) * kHeadDim;
  reinterpret_cast<Rounded *>(out)[lane] = rounded;
}

} // namespace

// A block a row: 16 bytes of a key or value a thread.
extern "C" __global__ void __launch_bounds__(kWriteThreads)
    trie_decode_write(const __grid_constant__ WriteArguments a) {
  const int slot = a.slots[blockIdx.x], row = a.rows[blockIdx.x];
  if (slot < 0) return;
  const int64_t to =
      slot / a.page_size * a.kv.page_stride + slot % a.page_size * a.kv.slot_stride;
  const int chunks = a.head_dim / kChunkColumns;
  for (int i = threadIdx.x; i < 2 * a.kv_heads * chunks; i += kWriteThreads) {
    const int chunk = i % chunks, head = i / chunks % a.kv_heads;
    const bool value = i >= a.kv_heads * chunks;
    const Rows &from = value ? a.new_v : a.new_k;
    const int64_t first = row * from.row_stride + head * from.head_stride;
    auto *pages = static_cast<uint16_t *>(value ? a.kv.v : a.kv.k) + to + head * a.kv.head_stride;
    reinterpret_cast<uint4 *>(pages)[chunk] =
        reinterpret_cast<const uint4 *>(static_cast<const uint16_t *>(from.data) + first)[chunk];
  }
}

#define TW_PARTIAL(DTYPE, ELEMENT, HEAD_DIM, WARPGROUPS)                                           \
  extern "C" __global__ void __launch_bounds__(partial_threads(WARPGROUPS),                        \
                                               blocks_per_multiprocessor(HEAD_DIM, WARPGROUPS))    \
      trie_decode_partial_##DTYPE##_##HEAD_DIM##_##WARPGROUPS(                                     \
          const __grid_constant__ PartialArguments a) {                                            \
    partial<ELEMENT, HEAD_DIM, WARPGROUPS>(a);                                                     \
  }
#define TW_MERGE(DTYPE, ELEMENT, HEAD_DIM)                                                         \
  extern "C" __global__ void __launch_bounds__(kMergeThreads)                                      \
      trie_decode_merge_##DTYPE##_##HEAD_DIM(const __grid_constant__ MergeArguments a) {           \
    merge<ELEMENT, HEAD_DIM>(a);                                                                   \
  }
#define TW_KERNELS(DTYPE, ELEMENT, HEAD_DIM)                                                       \
  TW_PARTIAL(DTYPE, ELEMENT, HEAD_DIM, 1)                                                          \
  TW_PARTIAL(DTYPE, ELEMENT, HEAD_DIM, 2)                                                          \
  TW_MERGE(DTYPE, ELEMENT, HEAD_DIM)

TW_KERNELS(bfloat16, cutlass::bfloat16_t, 64)
TW_KERNELS(bfloat16, cutlass::bfloat16_t, 128)
TW_KERNELS(float16, cutlass::half_t, 64)
TW_KERNELS(float16, cutlass::half_t, 128)

} // namespace tw::cuda
