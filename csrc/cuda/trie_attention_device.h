// What the trie attention kernels share. Device code: barriers, bulk copies, products, the mask.
#pragma once

#include <cute/tensor.hpp>

#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/numeric_conversion.h>

#include "cuda/trie_attention.h"

namespace tw::cuda {

using namespace cute;
namespace gmma = SM90::GMMA;
using Bfloat = cutlass::bfloat16_t;

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// Of 65536 registers: setmaxnreg takes them from the copying warpgroup for the computing ones.
constexpr int kProducerRegisters = 24;
constexpr int kConsumerRegisters = 240;
static_assert(128 * (kProducerRegisters + kConsumers * kConsumerRegisters) <= 65536);

// ---- Barriers in shared memory (mbarrier). CUTLASS's wait lets the compiler move ordinary reads
// of shared memory ahead of it; these do not.

__device__ inline uint32_t shared_address(const void *p) { return cast_smem_ptr_to_uint(p); }

__device__ inline void init(uint64_t &barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)),
               "r"(arrivals)
               : "memory");
}

__device__ inline void arrive(uint64_t &barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier))
               : "memory");
}

// Arrives, and lets the barrier wait for that many copied bytes too.
__device__ inline void arrive_expecting(uint64_t &barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(&barrier)),
               "r"(bytes)
               : "memory");
}

// Returns once the phase of that parity is complete. A new barrier is in phase 0, and the phase
// before it, of parity 1, counts as complete.
__device__ inline void wait(uint64_t &barrier, uint32_t parity) {
  uint32_t complete = 0;
  while (!complete)
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, p;\n"
                 "}"
                 : "=r"(complete)
                 : "r"(shared_address(&barrier)), "r"(parity)
                 : "memory");
}

// A position in a ring of kStages buffers: one side waits for full with `parity`, the other for
// empty with the opposite one.
template <int kStages> struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// One arrival from each warp, when all its lanes are here.
constexpr int kWarpArrivals = 4 * kConsumers;
__device__ inline void release(uint64_t &barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) arrive(barrier);
}

// ---- Tiles

// kCount tiles of kRows x D, and the same transposed, in the 128-byte swizzle of the copy engine.
template <int kRows, int D, int kCount>
using TileLayout = decltype(tile_to_shape(gmma::Layout_K_SW128_Atom<Bfloat>{},
                                          Shape<Int<kRows>, Int<D>, Int<kCount>>{}));
template <int kRows, int D, int kCount>
using TransposedLayout =
    decltype(tile_to_shape(gmma::Layout_MN_SW128_Atom<Bfloat>{},
                           Shape<Int<D>, Int<kRows>, Int<kCount>>{}, Step<_2, _1, _3>{}));

// Rows and columns at powers of two say all: the offsets are linear in their bits.
template <int kRows, int D> constexpr bool layouts_are_the_copy_engines() {
  constexpr decltype(as_position_independent_swizzle_layout(TileLayout<kRows, D, 2>{})) tiles;
  constexpr decltype(as_position_independent_swizzle_layout(TransposedLayout<kRows, D, 2>{}))
      transposed;
  for (int bit = 1; bit < 2 * kRows * D; bit *= 2) {
    const int stage = bit / (kRows * D), row = bit / D % kRows, column = bit % D;
    const int offset = stage * kRows * D + box_offset(kRows, row, column);
    if (tiles(row, column, stage) != offset) return false;
    if (transposed(column, row, stage) != offset) return false;
  }
  return true;
}
static_assert(layouts_are_the_copy_engines<64, 64>() && layouts_are_the_copy_engines<64, 128>());
static_assert(layouts_are_the_copy_engines<128, 64>() && layouts_are_the_copy_engines<128, 128>());

// Copies rows [row, row + kRows) of one head, kRows * D * 2 bytes in all, towards the barrier.
template <int kRows, int D>
__device__ void load_tile(const TensorMap &map, uint64_t &barrier, Bits *tile, int head, int row) {
  for (int box = 0; box < D / kBoxColumns; ++box)
    SM90_TMA_LOAD_3D::copy(&map, &barrier, static_cast<uint64_t>(TMA::CacheHintSm90::EVICT_NORMAL),
                           tile + box * kRows * kBoxColumns, box * kBoxColumns, head, row);
}

// Copies kCount numbers of 4 bytes; `from` is 16-byte aligned.
template <int kCount>
__device__ void load_numbers(const void *from, uint64_t &barrier, void *to) {
  SM90_BULK_COPY_G2S::copy(from, &barrier, to, kCount * 4);
}

template <class Layout> __device__ auto tensor(const Bits *tiles) {
  return make_tensor(make_smem_ptr(reinterpret_cast<const Bfloat *>(tiles)), Layout{});
}

// ---- Products of one warpgroup: 64 rows, the columns of B^T, accumulated in float32

// A and B from shared memory, both K-major: A is 64 x kDepth, B is kColumns x kDepth.
template <int kColumns, int kDepth>
using SharedProduct = decltype(make_tiled_mma(
    gmma::ss_op_selector<Bfloat, Bfloat, float, Shape<_64, Int<kColumns>, Int<kDepth>>>()));
// A from registers; B is kDepth x kColumns with contiguous columns.
template <int kColumns, int kDepth>
using RegisterProduct = decltype(make_tiled_mma(
    gmma::rs_op_selector<Bfloat, Bfloat, float, Shape<_64, Int<kColumns>, Int<kDepth>>,
                         gmma::Major::K, gmma::Major::MN>()));

// A thread's share of 64 x kColumns, its elements as product_row and product_column number them.
template <int kColumns>
using Fragment = decltype(partition_fragment_C(SharedProduct<kColumns, 64>{},
                                               Shape<_64, Int<kColumns>>{}));

// The same share as the left operand of a RegisterProduct of that depth, in the same order.
template <int kDepth>
using Operand = decltype(make_tensor<Bfloat>(
    partition_shape_A(RegisterProduct<64, kDepth>{}, Shape<_64, Int<kDepth>>{})));

// Tiles in shared memory as operands: (.., .., step of the depth, tile). On the left one tile for
// each warpgroup, on the right a ring of them.
template <class Product, int D> __device__ auto left_operand(const Bits *tiles) {
  const auto slice = Product{}.get_slice(threadIdx.x % 128);
  return slice.make_fragment_A(slice.partition_A(
      tensor<TileLayout<kWarpgroupRows, D, kConsumers>>(tiles)));
}
template <class Product, class Layout> __device__ auto right_operand(const Bits *tiles) {
  const auto slice = Product{}.get_slice(threadIdx.x % 128);
  return slice.make_fragment_B(slice.partition_B(tensor<Layout>(tiles)));
}

enum class Into { zero, sum };

// Starts C = A B^T or C += A B^T; `finish` says when A, B and C may be touched again.
template <class Product, class A, class B, class C>
__device__ void start(Product product, A &&a, const B &b, C &c, Into into) {
  product.accumulate_ = into == Into::zero ? gmma::ScaleOut::Zero : gmma::ScaleOut::One;
  constexpr bool in_registers = is_same_v<typename remove_cvref_t<A>::value_type, Bfloat>;
  if constexpr (in_registers) warpgroup_fence_operand(a);
  warpgroup_fence_operand(c);
  warpgroup_arrive();
  CUTE_UNROLL
  for (int step = 0; step < size<2>(a); ++step) {
    cute::gemm(product, a(_, _, step), b(_, _, step), c);
    product.accumulate_ = gmma::ScaleOut::One;
  }
  warpgroup_commit_batch();
}

// Waits until at most kLeft of the products started are still running.
template <int kLeft, class C> __device__ void finish(C &c) {
  warpgroup_wait<kLeft>();
  warpgroup_fence_operand(c);
}

// Values are computed here, while products run: the compiler would put it off until they are used.
// It takes a loop as well, such as `wait`, to hold instructions before the next `finish`.
template <class Values> __device__ void compute_now(Values &values) {
  warpgroup_fence_operand(values);
}

template <class Values, class Narrow> __device__ void narrow(const Values &from, Narrow &to) {
  constexpr int kCount = decltype(size(from))::value;
  static_assert(kCount == decltype(size(to))::value);
  const auto &array = *reinterpret_cast<const cutlass::Array<float, kCount> *>(from.data());
  const auto narrowed = cutlass::NumericArrayConverter<Bfloat, float, kCount>::convert(array);
  CUTE_UNROLL
  for (int e = 0; e < kCount; ++e) to(e) = narrowed[e];
}

__device__ inline float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The scores of rows `row` and row + 8 that the trie hides become -inf.
template <class Scores>
__device__ void hide(Scores &s, int row, int first_column, const int32_t *ends) {
  CUTE_UNROLL
  for (int e = 0; e < size(s); ++e) {
    const int column = product_column(threadIdx.x, e);
    if (!visible(row + e / 2 % 2 * 8, first_column + column, ends[column])) s(e) = -INFINITY;
  }
}

// Stores a warpgroup's 64 x D tile through its own buffer in shared memory. The tile's rows beyond
// the tensor's end are cut off by the copy engine.
template <int D, class Values>
__device__ void store_tile(const TensorMap &map, Bits *buffer, const Values &values, int head,
                           int row) {
  const int barrier = threadIdx.x / 128;
  int thread = threadIdx.x % 128;
  asm volatile("" : "+r"(thread)); // or its addresses are kept, and spilled, throughout the tile
  Operand<D> narrowed; // any fragment of that many bfloat16
  narrow(values, narrowed);
  const auto copy =
      make_tiled_copy_C(Copy_Atom<SM90_U32x4_STSM_N, Bfloat>{}, SharedProduct<D, 64>{});
  const auto slice = copy.get_thread_slice(thread);
  auto from = make_tensor(narrowed.data(), Fragment<D>{}.layout());
  auto tile = make_tensor(make_smem_ptr(reinterpret_cast<Bfloat *>(buffer)),
                          TileLayout<kWarpgroupRows, D, 1>{});

  if (thread == 0) tma_store_wait<0>(); // the buffer's last store has read it
  cutlass::arch::NamedBarrier::sync(128, barrier);
  cute::copy(copy, slice.retile_S(from), slice.partition_D(tile(_, _, 0)));
  tma_store_fence();
  cutlass::arch::NamedBarrier::sync(128, barrier);
  if (thread != 0) return;
  for (int box = 0; box < D / kBoxColumns; ++box)
    SM90_TMA_STORE_3D::copy(&map, buffer + box * kWarpgroupRows * kBoxColumns, box * kBoxColumns,
                            head, row);
  tma_store_arrive();
}

// ---- A thread block: one thread copies, two warpgroups compute. `init_barriers`, `produce` and
// `consume` are those of the kernel's Shared.
template <class Shared, class Arguments> __device__ void run(const Arguments &a) {
  extern __shared__ __align__(1024) unsigned char memory[];
  auto &shared = *reinterpret_cast<Shared *>(memory);
  if (threadIdx.x == 0) {
    init_barriers(shared);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  const int warpgroup = cutlass::canonical_warp_group_idx();
  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<kProducerRegisters>();
    if (threadIdx.x == 0) produce(a, shared);
  } else {
    cutlass::arch::warpgroup_reg_alloc<kConsumerRegisters>();
    consume(a, shared, warpgroup - 1);
    tma_store_wait<0>(); // shared memory must outlive the last store
  }
}

} // namespace tw::cuda
