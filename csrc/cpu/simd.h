// Vectors of TW_LANES floats, out of the vector types of GCC and Clang. Each instruction set
// compiles this file on its own, in its own namespace, so that no function built for wide registers
// can end up in code for a processor without them. For the same reason nothing here and in
// the kernels uses functions of the standard library's templates.
//
// Define TW_ISA (the namespace) and TW_LANES before including it.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "trie_attention.h"

#define TW_INLINE inline __attribute__((always_inline))

namespace tw::TW_ISA {

constexpr int kLanes = TW_LANES;
constexpr float kLog2E = 1.4426950408889634f;

typedef float Floats __attribute__((vector_size(4 * TW_LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * TW_LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * TW_LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * TW_LANES)));

TW_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
TW_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
// n rounded up to whole vectors.
TW_INLINE int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

template <class Vector> TW_INLINE Vector load_as(const void *p) {
  Vector x;
  memcpy(&x, p, sizeof x);
  return x;
}

TW_INLINE Floats load(const float *p) { return load_as<Floats>(p); }
template <class Vector> TW_INLINE void store(void *p, Vector x) { memcpy(p, &x, sizeof x); }
TW_INLINE Floats all(float x) { return x - Floats{}; }
TW_INLINE Floats max(Floats a, Floats b) { return a > b ? a : b; }
TW_INLINE Floats multiply_add(Floats a, Floats b, Floats sum) { return a * b + sum; }

template <int... I> TW_INLINE Ints lane_numbers(std::integer_sequence<int, I...>) {
  return Ints{I...};
}
TW_INLINE Ints lane_numbers() { return lane_numbers(std::make_integer_sequence<int, kLanes>()); }

// 2^x to one unit in the last place; 0 below 2^-126; for x < 127.
TW_INLINE Floats exp2(Floats x) {
  // Adding 1.5 * 2^23 leaves round(x) in the low bits of the sum.
  const Floats magic = all(12582912.0f);
  const Floats shifted = x + magic;
  const Floats r = x - (shifted - magic);
  // 2^r on [-1/2, 1/2], relative error 2e-9, exact at 0.
  Floats y = r * 0.00015353361959569156f + 0.0013398875016719103f;
  y = r * y + 0.00961843691766262f;
  y = r * y + 0.055503323674201965f;
  y = r * y + 0.24022647738456726f;
  y = r * y + 0.6931471824645996f;
  y = r * y + 1.0f;
  const Floats power = (Floats)(((Bits)shifted << 23) + 0x3f800000u);
  // Written so that a NaN stays one, whatever its payload is: that excludes adding to y's exponent.
  return x <= -126.0f ? Floats{} : y * power;
}

// tanh(x), relative error 3e-7; a NaN stays one.
TW_INLINE Floats tanh(Floats x) {
  const Bits sign = (Bits)x & 0x80000000u;
  const Floats a = (Floats)((Bits)x ^ sign), square = x * x;
  // Below 5/8 an odd polynomial (Cephes, tanhf), since there the other form cancels.
  Floats y = square * -5.70498872745e-3f + 2.06390887954e-2f;
  y = square * y - 5.37397155531e-2f;
  y = square * y + 1.33314422036e-1f;
  y = square * y - 3.33332819422e-1f;
  const Floats low = x * square * y + x;
  const Floats bounded = a > 10.0f ? all(10.0f) : a; // from 9.1 on the result is 1
  const Floats high = 1.0f - 2.0f / (exp2(bounded * (2 * kLog2E)) + 1.0f);
  return a < 0.625f ? low : (Floats)((Bits)high | sign);
}

// Values that are not finite become 0.
TW_INLINE Floats finite_or_zero(Floats x) { return x - x == Floats{} ? x : Floats{}; }

TW_INLINE Floats from_bfloat16(Halves h) {
  return (Floats)(__builtin_convertvector(h, Bits) << 16);
}

TW_INLINE Halves to_bfloat16(Floats x) {
  const Bits b = (Bits)x;
  const Bits rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16; // to nearest even
  return __builtin_convertvector(x == x ? rounded : (b >> 16) | 0x40u, Halves);
}

TW_INLINE Floats from_float16(Halves h) {
  const Bits b = __builtin_convertvector(h, Bits);
  const Bits sign = (b & 0x8000u) << 16, magnitude = (b & 0x7fffu) << 13;
  // The product moves the exponent from float16's bias to float32's, subnormals included.
  const Floats finite = (Floats)magnitude * 0x1p112f;
  const Bits special = magnitude | 0x7f800000u; // infinity or NaN
  return (Floats)(sign | (magnitude >= (0x7c00u << 13) ? special : (Bits)finite));
}

TW_INLINE Halves to_float16(Floats x) {
  const Bits b = (Bits)x, sign = (b >> 16) & 0x8000u, magnitude = b & 0x7fffffffu;
  const Bits normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14 the sum has float16's last place as its own, so the addition rounds.
  const Bits tiny = (Bits)((Floats)magnitude + 0.5f) - 0x3f000000u;
  Bits y = magnitude < (113u << 23) ? tiny : normal;
  y = magnitude >= 0x477ff000u ? y * 0u + 0x7c00u : y; // 65520 and above
  y = magnitude > 0x7f800000u ? y * 0u + 0x7e00u : y;
  return __builtin_convertvector(sign | y, Halves);
}

TW_INLINE int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

TW_INLINE Floats load_as_floats(const char *p, Dtype dtype) {
  if (dtype == Dtype::float32) return load_as<Floats>(p);
  const Halves h = load_as<Halves>(p);
  return dtype == Dtype::bfloat16 ? from_bfloat16(h) : from_float16(h);
}

TW_INLINE void store_floats(char *p, Dtype dtype, Floats x) {
  if (dtype == Dtype::float32)
    store(p, x);
  else
    store(p, dtype == Dtype::bfloat16 ? to_bfloat16(x) : to_float16(x));
}

// The first n values at `from`, or kLanes if that is fewer; the rest is 0.
TW_INLINE Halves load_halves(const char *from, int64_t n) {
  if (n >= kLanes) return load_as<Halves>(from);
  Halves h = {};
  memcpy(&h, from, n * 2);
  return h;
}

// Whether n values, a multiple of kLanes, are all neither NaN nor infinite.
inline bool all_finite(const float *x, int64_t n) {
  // Those that are not have all exponent bits set: adding one carries into the sign bit.
  Bits signs = {};
  for (int64_t i = 0; i < n; i += kLanes)
    signs |= (load_as<Bits>(x + i) & 0x7f800000u) + 0x00800000u;
  bool any = false;
  for (int l = 0; l < kLanes; ++l) any |= signs[l] >> 31;
  return !any;
}

// n values of `from` as floats, and zeros up to the next multiple of kLanes.
inline void load_row(float *to, const char *from, Dtype dtype, int64_t n) {
  const int64_t size = size_of(dtype);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load_as_floats(from + i * size, dtype));
  if (i == n) return;
  char rest[4 * kLanes] = {};
  memcpy(rest, from + i * size, (n - i) * size);
  store(to + i, load_as_floats(rest, dtype));
}

// from[0:n] * factor.
inline void store_row(char *to, const float *from, Dtype dtype, int64_t n, float factor) {
  const int64_t size = size_of(dtype);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    store_floats(to + i * size, dtype, load(from + i) * factor);
  if (i == n) return;
  char rest[4 * kLanes];
  store_floats(rest, dtype, load(from + i) * factor);
  memcpy(to + i * size, rest, (n - i) * size);
}

// One stage of a transposition: swaps the off-diagonal S x S quarters of every 2S x 2S square.
template <int S, int... I>
TW_INLINE void swap_quarters(Floats *x, std::integer_sequence<int, I...>) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & S) continue;
    const Floats a = x[i], b = x[i + S];
    x[i] = __builtin_shufflevector(a, b, (I & S ? kLanes + I - S : I)...);
    x[i + S] = __builtin_shufflevector(a, b, (I & S ? kLanes + I : I + S)...);
  }
}

template <int S> TW_INLINE void transpose_stages(Floats *x) {
  if constexpr (S > 0) {
    swap_quarters<S>(x, std::make_integer_sequence<int, kLanes>());
    transpose_stages<S / 2>(x);
  }
}

// to[j][i] = from[i][j] * factor for i < rows, j < columns, both multiples of kLanes.
inline void transpose(float *to, const float *from, int64_t rows, int64_t columns, float factor) {
  for (int64_t i = 0; i < rows; i += kLanes)
    for (int64_t j = 0; j < columns; j += kLanes) {
      Floats x[kLanes];
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; ++l) x[l] = load(from + (i + l) * columns + j) * factor;
      transpose_stages<kLanes / 2>(x);
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; ++l) store(to + (j + l) * rows + i, x[l]);
    }
}

} // namespace tw::TW_ISA
