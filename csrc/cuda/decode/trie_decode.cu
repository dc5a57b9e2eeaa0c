// The decode kernels for sm_90a (trie_decode.h says what they do for one another).
//
// What bounds `attend`: a key and its value are 4 x head_dim bytes and take 4 x head_dim operations a
// matrix row (query rows x query heads of the group). By the data sheet (3.35 TB/s, 989 TFLOP/s)
// memory is the limit up to some 300 rows. So few rows are padded to the 64 of a warpgroup's product;
// and where rows are many, a tile of keys is read from L2 once for 128 of them.
//
// The grid is persistent, a block a multiprocessor: one warp takes units (an item, a KV head, up to
// 128 matrix rows) as they come in the plan's order, wide ones among narrow ones, and fetches their
// tiles of K and V into a ring, without a pause from unit to unit. The results do not depend on which
// block takes what.
#include <cutlass/arch/reg_reconfig.h>

#include "cuda/decode/attend.h"
#include "cuda/decode/feed.h"

namespace tw::cuda {

namespace {

// Of a thread: setmaxnreg takes them from the feeding warps for the multiplying ones.
constexpr int kFeedRegisters = 40, kMultiplyRegisters = 232;
static_assert(kFeedRegisters + kRowWarpgroups * kMultiplyRegisters <=
              (1 + kRowWarpgroups) * launch_registers((1 + kRowWarpgroups) * kWarpgroupThreads));

template <int D> __device__ void init_barriers(AttendShared<D> &shared) {
  for (int slot = 0; slot < AttendShared<D>::kSlots; ++slot)
    init(shared.tile_full[slot], 1), init(shared.tile_empty[slot], kTileReleases);
  for (int w = 0; w < kRowWarpgroups; ++w)
    init(shared.part_full[w], 1), init(shared.part_empty[w], kWarps);
  for (int i = 0; i < kUnitsAhead; ++i)
    init(shared.unit_full[i], 1), init(shared.unit_empty[i], kRowWarpgroups);
  cutlass::arch::fence_barrier_init();
}

template <class Element, int D> __device__ void attend_units(const AttendArguments &a) {
  extern __shared__ __align__(1024) char memory[];
  auto &shared = *reinterpret_cast<AttendShared<D> *>(memory);
  if (threadIdx.x == 0) init_barriers(shared);
  __syncthreads();
  wait_for_last_launch();
  const int warpgroup = cutlass::canonical_warp_group_idx();
  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<kFeedRegisters>();
    const int warp = cutlass::canonical_warp_idx_sync();
    if (warp == 0) fetch(a, shared);
    else if (warp <= kRowWarpgroups) gather<Element>(a, shared, warp - 1);
  } else {
    cutlass::arch::warpgroup_reg_alloc<kMultiplyRegisters>();
    attend<Element>(a, shared, warpgroup - 1);
  }
}

// One warp: a row and head. Rows with one result have their output already.
template <class Element, int kHeadDim> __device__ void merge(const MergeArguments &a) {
  constexpr int kColumns = kHeadDim / 32; // of a lane
  const int lane = threadIdx.x % 32;
  const int index = blockIdx.x * (kMergeThreads / 32) + threadIdx.x / 32;
  const int row = index / a.heads, head = index % a.heads;
  const bool is_row = row < a.num_rows;
  const int first = is_row ? a.merge_ptr[row] : 0, end = is_row ? a.merge_ptr[row + 1] : 0;
  // All threads, whatever they do: what follows this launch must not begin before attend has ended.
  wait_for_last_launch();
  if (!is_row || end - first == 1) return;

  float top = -1e30f; // finite, as in Softmax
  for (int i = first + lane; i < end; i += 32)
    top = fmaxf(top, a.partial_lse[int64_t{a.merge_slots[i]} * a.heads + head]);
  for (int step = 16; step; step /= 2) top = fmaxf(top, __shfl_xor_sync(kWarp, top, step));

  using Rounded = cutlass::AlignedArray<Element, kColumns>;
  cutlass::Array<float, kColumns> sums;
  sums.clear();
  float total = 0;
#pragma unroll 4
  for (int i = first; i < end; ++i) {
    const int64_t result = int64_t{a.merge_slots[i]} * a.heads + head;
    const float weight = exp2_approximate(a.partial_lse[result] - top);
    const Rounded part = static_cast<const Rounded *>(
        a.partial_out)[result * (kHeadDim / kColumns) + lane];
    const auto wide = cutlass::NumericArrayConverter<float, Element, kColumns>::convert(part);
    total += weight;
    CUTE_UNROLL
    for (int c = 0; c < kColumns; ++c) sums[c] += weight * wide[c];
  }
  const float inverse = total == 0 ? 0 : 1 / total; // padding rows have nothing to merge
  CUTE_UNROLL
  for (int c = 0; c < kColumns; ++c) sums[c] *= inverse;
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
  let_next_launch_begin();
  if (blockIdx.x == 0 && threadIdx.x == 0) *a.next_unit = 0;
  if (blockIdx.x >= a.num_rows) return;
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

#define TW_KERNELS(DTYPE, ELEMENT, HEAD_DIM)                                                       \
  extern "C" __global__ void __launch_bounds__(kAttendThreads, 1)                                  \
      trie_decode_attend_##DTYPE##_##HEAD_DIM(const __grid_constant__ AttendArguments a) {         \
    attend_units<ELEMENT, HEAD_DIM>(a);                                                            \
  }                                                                                                \
  extern "C" __global__ void __launch_bounds__(kMergeThreads)                                      \
      trie_decode_merge_##DTYPE##_##HEAD_DIM(const __grid_constant__ MergeArguments a) {           \
    merge<ELEMENT, HEAD_DIM>(a);                                                                   \
  }

TW_KERNELS(bfloat16, cutlass::bfloat16_t, 64)
TW_KERNELS(bfloat16, cutlass::bfloat16_t, 128)
TW_KERNELS(float16, cutlass::half_t, 64)
TW_KERNELS(float16, cutlass::half_t, 128)

} // namespace tw::cuda
