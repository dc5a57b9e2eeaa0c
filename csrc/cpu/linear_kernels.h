// The kernel of linear.h, once for each instruction set; see simd.h for what to define.
//
// An output is a dot product with the inputs in the lanes: W is read where it lies. A few rows of W
// meet a few of x in registers; for further rows of x they are then in the first cache.
#pragma once

#include "linear.h"
#include "trie_decode_dot.h"

namespace tw::TW_ISA {

namespace {

constexpr int64_t kMostRows = 4; // of x in registers

// The first n < kLanes values; the rest is 0.
TW_INLINE Floats load_first(const float *p, int64_t n) {
  float values[kLanes] = {};
  memcpy(values, p, n * 4);
  return load(values);
}

// M rows of x by R rows of W, M R <= kLanes: enough sums to hide the latency of a multiply-add, and
// one transposition to add up their lanes. Every sum is taken in the same order, whatever M and R.
template <int M, int R>
void dot_products(const LinearArgs &args, int64_t row, int64_t output, int64_t next) {
  const int64_t inputs = args.inputs;
  const float *x = args.x + row * inputs, *w = args.weight + output * inputs;
  const int64_t ahead = (next - output) * inputs;
  Floats sum[kLanes] = {};
  int64_t d = 0;
  for (; d + kLanes <= inputs; d += kLanes) {
    Floats a[M];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) a[m] = load(x + m * inputs + d);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const float *at = w + r * inputs + d;
      const Floats b = load(at);
      if (d % (64 / 4) == 0) __builtin_prefetch(at + ahead); // once a cache line
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) sum[r * M + m] = multiply_add(a[m], b, sum[r * M + m]);
    }
  }
  if (const int64_t rest = inputs - d)
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Floats b = load_first(w + r * inputs + d, rest);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m)
        sum[r * M + m] =
            multiply_add(load_first(x + m * inputs + d, rest), b, sum[r * M + m]);
    }
  const Floats y = sums_of_lanes(sum);
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m)
      args.y[(row + m) * args.outputs + output + r] =
          args.bias ? y[r * M + m] + args.bias[output + r] : y[r * M + m];
}

template <int M> void any_outputs(const LinearArgs &args, int64_t row, int64_t first, int64_t end) {
  constexpr int R = kLanes / M;
  for (; first + R <= end; first += R)
    dot_products<M, R>(args, row, first, min(first + R, args.outputs - R));
  for (; first < end; ++first) dot_products<M, 1>(args, row, first, first);
}

void chunk(const void *context, int64_t index, int) {
  const auto &args = *static_cast<const LinearArgs *>(context);
  const int64_t first = index * kLinearChunk, end = min(args.outputs, first + kLinearChunk);
  // Groups of rows as even as can be: a lone row would take as long as four.
  const int64_t groups = (args.rows + kMostRows - 1) / kMostRows;
  constexpr int64_t kStep = kLanes; // outputs that stay in the first cache for all groups
  for (int64_t from = first; from < end; from += kStep) {
    const int64_t to = min(end, from + kStep);
    for (int64_t group = 0, row = 0; group < groups; ++group) {
      const int64_t m = (args.rows - row + groups - group - 1) / (groups - group);
      switch (m) {
      case 1: any_outputs<1>(args, row, from, to); break;
      case 2: any_outputs<2>(args, row, from, to); break;
      case 3: any_outputs<3>(args, row, from, to); break;
      default: any_outputs<4>(args, row, from, to);
      }
      row += m;
    }
  }
}

} // namespace

const LinearKernel linear = chunk;

} // namespace tw::TW_ISA
