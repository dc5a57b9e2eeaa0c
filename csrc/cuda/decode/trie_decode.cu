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
#include <cutlass/arch/barrier.h>

#include "cuda/decode/index.h"
#include "cuda/decode/trie_decode.h"
#include "cuda/hopper/barrier.h"
#include "cuda/hopper/copy.h"
#include "cuda/hopper/product.h"
#include "cuda/hopper/softmax.h"

namespace tw::cuda {

namespace {

constexpr unsigned kWarp = 0xffffffff; // all its lanes

__device__ void sync_threads(int count) { cutlass::arch::NamedBarrier::sync(count, 0); }

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

// The ring of tiles of K and V in shared memory.
struct Slots {
  char *tiles;
  uint64_t *full, *empty; // barriers
};

// The fetching warp: tile by tile the item's keys [0, num_keys), K in one turn of the ring and V in
// the next. A lane copies one box.
template <int kHeadDim, int kSlots>
__device__ void fetch(const PartialArguments &a, const DecodeItem &item, int head, int num_keys,
                      const Slots &slots) {
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
      const auto [slot, parity] = Ring<kSlots>::at(turn);
      wait_hidden(slots.empty[slot], parity ^ 1);
      if (lane == 0)
        arrive_expecting(slots.full[slot],
                         arriving_bytes(num_keys - first_key, a.page_size, kHeadDim));
      __syncwarp();
      if (page >= 0)
        load_box(*map, slots.full[slot], slots.tiles + slot * tile_bytes(kHeadDim) + box.offset(),
                 box.strip * kBoxColumns, head, (first_key + box.key) % a.page_size, page);
      ++turn;
    }
    page = next_page;
  }
}

// A multiplying warpgroup: its tile of matrix rows [first_m, first_m + kTile) of the item, of which
// those below end_m exist. `threads`: of all warpgroups that multiply.
template <class Element, int kHeadDim, int kSlots>
__device__ void attend(const PartialArguments &a, const DecodeItem &item, int head, int first_m,
                       int end_m, KeyRange keys, int threads, char *q_tile, const Slots &slots) {
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
  publish();
  sync_threads(threads);

  int visible[2]; // keys of the thread's two rows
  for (int r = 0; r < 2; ++r) {
    const int m = first_m + product_row(thread, 2 * r);
    const int row = item.first_row + row_of(m, a.group);
    visible[r] = m < end_m ? visible_keys(item, a.positions[row]) : 0;
  }

  using KeyProduct = SharedProduct<Element, kTile, kHeadDim>;
  using ValueProduct = RegisterProduct<Element, kHeadDim, kTile>;
  const auto q =
      left_operand<KeyProduct, TileLayout<Element, kTile, kHeadDim, 1>>(q_tile)(_, _, _, 0);
  const auto k = right_operand<KeyProduct, TileLayout<Element, kTile, kHeadDim, kSlots>>(slots.tiles);
  const auto v =
      right_operand<ValueProduct, TransposedLayout<Element, kTile, kHeadDim, kSlots>>(slots.tiles);
  Fragment<kTile> scores;
  Operand<Element, kTile> weights;
  Fragment<kHeadDim> sums;
  clear(sums);

  Softmax softmax;
  for (int first_key = 0, turn = 0; first_key < keys.most; first_key += kTile, turn += 2) {
    const auto k_at = Ring<kSlots>::at(turn), v_at = Ring<kSlots>::at(turn + 1);
    wait_hidden(slots.full[k_at.stage], k_at.parity);
    start(KeyProduct{}, q, k(_, _, _, k_at.stage), scores, Into::zero);
    finish<0>(scores);
    arrive_of_warp(slots.empty[k_at.stage]);

    if (first_key + kTile > keys.least) {
      CUTE_UNROLL
      for (int i = 0; i < size(scores); ++i) {
        const int key = first_key + product_column(thread, i);
        if (key >= visible[i / 2 % 2]) scores(i) = -INFINITY;
      }
    }
    scale_rows(sums, softmax.update(scores, a.scale_log2));
    narrow(scores, weights);

    wait_hidden(slots.full[v_at.stage], v_at.parity);
    if (first_key + kTile > keys.most) {
      // Beyond the last key the tile has whatever the page or the ring had, and 0 x NaN is NaN.
      const int first = keys.most - first_key, count = (kTile - first) * kChunks;
      for (int i = threadIdx.x; i < count; i += threads)
        *reinterpret_cast<uint4 *>(slots.tiles + v_at.stage * tile_bytes(kHeadDim) +
                                   chunk_offset(first + i / kChunks, i % kChunks)) = {0, 0, 0, 0};
      publish();
      sync_threads(threads);
    }
    start(ValueProduct{}, weights, v(_, _, _, v_at.stage), sums, Into::sum);
    finish<0>(sums);
    arrive_of_warp(slots.empty[v_at.stage]);
  }

  CUTE_UNROLL
  for (int r = 0; r < 2; ++r) {
    const float sum = softmax.total(r);
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
    if (thread % 4 == 0) a.lse[result] = sum == 0 ? -INFINITY : softmax.max[r] + log2f(sum);
  }
}

template <class Element, int kHeadDim, int kWarpgroups>
__device__ void partial(const PartialArguments &a) {
  constexpr int kSlots = ring_slots(kHeadDim, kWarpgroups);
  static_assert(layouts_are_the_copy_engines<Element, kTile, kHeadDim>());
  // The hardware takes 1 KiB of each block's share of the 228.
  static_assert(blocks_per_multiprocessor(kHeadDim, kWarpgroups) *
                    (partial_shared_bytes(kHeadDim, kWarpgroups) + 1024) <=
                228 * 1024);
  extern __shared__ __align__(1024) char shared[]; // swizzled tiles start at multiples of 1024
  Slots slots;
  slots.tiles = shared + kWarpgroups * tile_bytes(kHeadDim);
  slots.full = reinterpret_cast<uint64_t *>(slots.tiles + kSlots * tile_bytes(kHeadDim));
  slots.empty = slots.full + kSlots;

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
      init(slots.full[slot], 1);
      init(slots.empty[slot], releases(warpgroups));
    }
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  const int warpgroup = cutlass::canonical_warp_group_idx();
  if (warpgroup == kWarpgroups) {
    fetch<kHeadDim, kSlots>(a, item, part.head, keys.most, slots);
  } else if (warpgroup < warpgroups) {
    attend<Element, kHeadDim, kSlots>(a, item, part.head, first_m + warpgroup * kTile, end_m, keys,
                                      warpgroups * kWarpgroupThreads,
                                      shared + warpgroup * tile_bytes(kHeadDim), slots);
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

  float top = -1e30f; // finite, as in Softmax
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
    const float weight = exp2_approximate(a.partial_lse[result] - top);
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
    const Heads &from = value ? a.new_v : a.new_k;
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
