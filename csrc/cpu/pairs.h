// Two bfloat16 values in a 32-bit word, the first in its low half: what AVX512_BF16 multiplies and
// adds up at the cost of one float32. Subnormal values count as 0.
#pragma once

#include "simd.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace tw::TW_ISA {

typedef uint32_t Pair;

TW_INLINE Bits load(const Pair *p) { return load_as<Bits>(p); }
TW_INLINE Bits all(Pair x) { return x - Bits{}; }

// Values that are not finite become 0.
TW_INLINE Bits finite_or_zero(Bits pairs) {
  const Bits infinity = Bits{} + 0x7f80u, none = Bits{};
  const Bits low = (pairs & infinity) == infinity ? none : none + 0xffffu;
  const Bits high = (pairs >> 16 & infinity) == infinity ? none : none + 0xffff0000u;
  return pairs & (low | high);
}

constexpr Pair kPairOfOnes = 0x3f803f80u;

#if defined(__AVX512BF16__)
constexpr bool kMultipliesPairs = true;

// sum + a[0] b[0] + a[1] b[1] of every pair.
TW_INLINE Floats multiply_add(Bits a, Bits b, Floats sum) {
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}

template <int... I>
TW_INLINE Bits interleaved(__m512bh x, std::integer_sequence<int, I...>) {
  typedef uint16_t Values __attribute__((vector_size(64)));
  const Values values = (Values)x;
  return (Bits)__builtin_shufflevector(values, values, (I % 2 * kLanes + I / 2)...);
}

// Lane l: a[l] and b[l], to nearest even.
TW_INLINE Bits rounded_pairs(Floats a, Floats b) {
  return interleaved(_mm512_cvtne2ps_pbh((__m512)b, (__m512)a),
                     std::make_integer_sequence<int, 2 * kLanes>());
}

// 2^x for rounding to bfloat16, which loses twenty times more: relative error 1e-4, exact at
// integers; 0 at -infinity, where y is a NaN.
TW_INLINE Floats coarse_exp2(Floats x) {
  constexpr int to_nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const Floats whole = (Floats)_mm512_roundscale_ps((__m512)x, to_nearest);
  const Floats r = x - whole;
  Floats y = r * 0.05500858f + 0.24221037f;
  y = r * y + 0.6932829f;
  y = r * y + 1.0f;
  return (Floats)_mm512_scalef_ps((__m512)y, (__m512)whole);
}
#else
// Declared for templates to name; without the instructions none of them calls it.
constexpr bool kMultipliesPairs = false;
Floats multiply_add(Bits a, Bits b, Floats sum);
Bits rounded_pairs(Floats a, Floats b);
Floats coarse_exp2(Floats x);
#endif

} // namespace tw::TW_ISA
