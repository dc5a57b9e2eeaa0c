// The kernels of sampling.h, once for each instruction set; see simd.h for what to define.
//
// Compiled without contraction of products and sums (CMakeLists.txt): a fused multiply-add rounds
// once where the definition rounds twice.
#pragma once

#include "sampling.h"
#include "simd.h"

namespace tw::TW_ISA {

namespace {

typedef uint64_t LongBits __attribute__((vector_size(8 * TW_LANES)));

// round(2^40 e^d) for d <= 0, by Cephes' expf in float32; 0 for a NaN.
TW_INLINE void store_weights(int64_t *to, Floats d) {
  const Floats least = all(-29.0f); // whose weight is 0
  const Floats x = d > least ? d : least;
  // Adding 1.5 * 2^23 leaves round(x / ln 2), -n, in the low bits of the sum.
  const Floats magic = all(12582912.0f);
  const Floats shifted = x * kLog2E + magic, n = shifted - magic;
  const Floats r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Floats y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  // y is in (0.7, 1.5): the conversion is exact.
  const LongBits fraction = __builtin_convertvector(
      __builtin_convertvector(y * 0x1p24f, Ints), LongBits);
  const LongBits shift = __builtin_convertvector((Bits)magic - (Bits)shifted, LongBits);
  const LongBits half = (((LongBits){} + 1) << shift) >> 1;
  store(to, ((fraction << 16) + half) >> shift);
}

float largest(const float *x, int64_t n) {
  Floats most = all(-__builtin_inff());
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) most = max(load(x + i), most);
  float result = -__builtin_inff();
  for (int l = 0; l < kLanes; ++l) result = most[l] > result ? most[l] : result;
  for (; i < n; ++i) result = x[i] > result ? x[i] : result;
  return result;
}

void weigh(const float *x, int64_t n, float most, int64_t *weights) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store_weights(weights + i, load(x + i) - most);
  if (i == n) return;
  float rest[kLanes] = {};
  int64_t last[kLanes];
  memcpy(rest, x + i, (n - i) * sizeof *x);
  store_weights(last, load(rest) - most);
  memcpy(weights + i, last, (n - i) * sizeof *weights);
}

} // namespace

const SamplingKernels sampling = {largest, weigh};

} // namespace tw::TW_ISA
