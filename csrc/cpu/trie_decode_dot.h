// Dot products with head dim in the lanes, and the reductions across lanes that they need.
#pragma once

#include "simd.h"

namespace tw::TW_ISA {

// One stage of a butterfly across lanes: lane l meets lane l ^ S.
template <int S, int... I> TW_INLINE Floats swapped(Floats x, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(x, x, (I ^ S)...);
}

template <int S = kLanes / 2> TW_INLINE float largest_lane(Floats x) {
  if constexpr (S == 0)
    return x[0];
  else
    return largest_lane<S / 2>(max(x, swapped<S>(x, std::make_integer_sequence<int, kLanes>())));
}

template <int S = kLanes / 2> TW_INLINE float sum_of_lanes(Floats x) {
  if constexpr (S == 0)
    return x[0];
  else
    return sum_of_lanes<S / 2>(x + swapped<S>(x, std::make_integer_sequence<int, kLanes>()));
}

// Of 2S vectors, S: lane l without bit S of a vector sums lanes l and l + S of its first parent;
// with it, of its second one.
template <int S, int... I>
TW_INLINE Floats sum_halves(Floats a, Floats b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I & S ? kLanes + I - S : I)...) +
         __builtin_shufflevector(a, b, (I & S ? kLanes + I : I + S)...);
}

// Lane l of the result is the sum of the lanes of x[l].
template <int S = kLanes / 2> TW_INLINE Floats sums_of_lanes(Floats *x) {
  if constexpr (S == 0) {
    return x[0];
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < S; ++i)
      x[i] = sum_halves<S>(x[i], x[i + S], std::make_integer_sequence<int, kLanes>());
    return sums_of_lanes<S / 2>(x);
  }
}

// q k of the kLanes keys from k on.
TW_INLINE Floats dot_products(const float *q, const float *k, int64_t stride, int64_t width) {
  Floats sum[kLanes] = {};
  for (int64_t d = 0; d < width; d += kLanes) {
    const Floats x = load(q + d);
#pragma GCC unroll 16
    for (int l = 0; l < kLanes; ++l) sum[l] += x * load(k + l * stride + d);
  }
  return sums_of_lanes(sum);
}

} // namespace tw::TW_ISA
