// Products of one warpgroup (wgmma): 64 rows, the columns of B^T, accumulated in float32. Device
// code.
#pragma once

#include <cute/tensor.hpp>
#include <cutlass/numeric_conversion.h>

#include "cuda/hopper/index.h"

namespace tw::cuda {

using namespace cute;
namespace gmma = SM90::GMMA;

// kCount tiles of kRows x D, and the same transposed, in the 128-byte swizzle of the copy engine.
template <class Element, int kRows, int D, int kCount>
using TileLayout = decltype(tile_to_shape(gmma::Layout_K_SW128_Atom<Element>{},
                                          Shape<Int<kRows>, Int<D>, Int<kCount>>{}));
template <class Element, int kRows, int D, int kCount>
using TransposedLayout =
    decltype(tile_to_shape(gmma::Layout_MN_SW128_Atom<Element>{},
                           Shape<Int<D>, Int<kRows>, Int<kCount>>{}, Step<_2, _1, _3>{}));

// Rows and columns at powers of two say all: the offsets are linear in their bits.
template <class Element, int kRows, int D> constexpr bool layouts_are_the_copy_engines() {
  constexpr decltype(as_position_independent_swizzle_layout(
      TileLayout<Element, kRows, D, 2>{})) tiles;
  constexpr decltype(as_position_independent_swizzle_layout(
      TransposedLayout<Element, kRows, D, 2>{})) transposed;
  for (int bit = 1; bit < 2 * kRows * D; bit *= 2) {
    const int stage = bit / (kRows * D), row = bit / D % kRows, column = bit % D;
    const int offset = stage * kRows * D + box_offset(kRows, row, column);
    if (tiles(row, column, stage) != offset) return false;
    if (transposed(column, row, stage) != offset) return false;
  }
  return true;
}

// A and B from shared memory, both K-major: A is 64 x kDepth, B is kColumns x kDepth.
template <class Element, int kColumns, int kDepth>
using SharedProduct = decltype(make_tiled_mma(
    gmma::ss_op_selector<Element, Element, float, Shape<_64, Int<kColumns>, Int<kDepth>>>()));
// A from registers; B is kDepth x kColumns with contiguous columns.
template <class Element, int kColumns, int kDepth>
using RegisterProduct = decltype(make_tiled_mma(
    gmma::rs_op_selector<Element, Element, float, Shape<_64, Int<kColumns>, Int<kDepth>>,
                         gmma::Major::K, gmma::Major::MN>()));

// A thread's share of 64 x kColumns, its elements as product_row and product_column number them.
template <int kColumns>
using Fragment = decltype(partition_fragment_C(SharedProduct<half_t, kColumns, 64>{},
                                               Shape<_64, Int<kColumns>>{}));

// The same share as the left operand of a RegisterProduct of that depth, in the same order.
template <class Element, int kDepth>
using Operand = decltype(make_tensor<Element>(
    partition_shape_A(RegisterProduct<Element, 64, kDepth>{}, Shape<_64, Int<kDepth>>{})));

// Threads and elements at powers of two say all here too.
template <int kColumns> constexpr bool fragments_are_numbered_so() {
  const auto index = SharedProduct<half_t, kColumns, 64>{}.get_layoutC_TV(); // row + 64 column
  const auto is_at = [&](int thread, int e) {
    return index(thread, e) == product_row(thread, e) + kWarpgroupRows * product_column(thread, e);
  };
  for (int thread = 1; thread < kWarpgroupThreads; thread *= 2)
    if (!is_at(thread, 0)) return false;
  for (int e = 1; e < kColumns / 2; e *= 2)
    if (!is_at(0, e)) return false;
  return true;
}
static_assert(fragments_are_numbered_so<64>() && fragments_are_numbered_so<128>());

// Tiles in shared memory as operands: (.., .., step of the depth, tile).
template <class Product, class Layout> __device__ auto left_operand(const void *tiles) {
  const auto slice = Product{}.get_slice(threadIdx.x % kWarpgroupThreads);
  const auto *elements = static_cast<const typename Product::ValTypeA *>(tiles);
  return slice.make_fragment_A(
      slice.partition_A(make_tensor(make_smem_ptr(elements), Layout{})));
}
template <class Product, class Layout> __device__ auto right_operand(const void *tiles) {
  const auto slice = Product{}.get_slice(threadIdx.x % kWarpgroupThreads);
  const auto *elements = static_cast<const typename Product::ValTypeB *>(tiles);
  return slice.make_fragment_B(
      slice.partition_B(make_tensor(make_smem_ptr(elements), Layout{})));
}

enum class Into { zero, sum };

// Starts C = A B^T or C += A B^T; `finish` says when A, B and C may be touched again.
template <class Product, class A, class B, class C>
__device__ void start(Product product, A &&a, const B &b, C &c, Into into) {
  product.accumulate_ = into == Into::zero ? gmma::ScaleOut::Zero : gmma::ScaleOut::One;
  using Value = typename remove_cvref_t<A>::value_type;
  if constexpr (is_same_v<Value, typename Product::ValTypeA>) warpgroup_fence_operand(a); // registers
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
  using Element = typename Narrow::value_type;
  const auto &array = *reinterpret_cast<const cutlass::Array<float, kCount> *>(from.data());
  const auto narrowed = cutlass::NumericArrayConverter<Element, float, kCount>::convert(array);
  CUTE_UNROLL
  for (int e = 0; e < kCount; ++e) to(e) = narrowed[e];
}

} // namespace tw::cuda
