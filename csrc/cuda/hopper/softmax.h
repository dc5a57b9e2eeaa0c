// The online softmax of a score tile in registers. Device code.
#pragma once

#include <cute/tensor.hpp>

namespace tw::cuda {

__device__ inline float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Of the two rows whose elements a thread holds (product_row).
struct Softmax {
  // Sums and products are relative to 2^max. A row that has seen no column keeps the finite start
  // value, so that 2^(-inf - max) is 0 and never NaN.
  float max[2] = {-1e30f, -1e30f};
  float sum[2] = {0, 0}; // of this thread's columns alone

  // Turns scores into probabilities; returns the factors by which earlier sums and products shrink.
  template <class Scores> __device__ float2 update(Scores &s, float scale_log2) {
    float shrink[2];
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      float highest = s(2 * h);
      CUTE_UNROLL
      for (int e = 0; e < size(s); e += 4)
        highest = fmaxf(highest, fmaxf(s(e + 2 * h), s(e + 2 * h + 1)));
      highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
      const float next = fmaxf(max[h], highest * scale_log2);
      shrink[h] = exp2_approximate(max[h] - next);
      max[h] = next;
      sum[h] *= shrink[h];
      CUTE_UNROLL
      for (int e = 0; e < size(s); e += 4)
        CUTE_UNROLL
        for (int column = 0; column < 2; ++column) {
          float &value = s(e + 2 * h + column);
          value = exp2_approximate(fmaf(value, scale_log2, -next));
          sum[h] += value;
        }
    }
    return {shrink[0], shrink[1]};
  }

  // Over the four threads that share the row.
  __device__ float total(int h) const {
    const float pair = sum[h] + __shfl_xor_sync(~0u, sum[h], 1);
    return pair + __shfl_xor_sync(~0u, pair, 2);
  }
};

template <class Values> __device__ void scale_rows(Values &values, float2 factors) {
  CUTE_UNROLL
  for (int e = 0; e < size(values); ++e) values(e) *= e / 2 % 2 ? factors.y : factors.x;
}

} // namespace tw::cuda
