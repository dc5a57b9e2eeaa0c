// A linear layer of few rows on the CPU, float32: y = x W^T + b, bound by reading W once.
//
// Libraries pack W anew at every call, or split it for many rows: with one to a few dozen rows, as in
// a decode step, they read it at a fraction of what memory gives.
#pragma once

#include <cstdint>

namespace tw {

struct LinearArgs {
  int64_t rows, inputs, outputs;
  const float *x;      // [rows, inputs]
  const float *weight; // [outputs, inputs]
  const float *bias;   // [outputs], or null
  float *y;            // [rows, outputs]
};

// On at most `threads` threads. An output depends on its row of x and of W alone, bit for bit:
// neither on `threads` nor on the other rows.
void few_row_linear(const LinearArgs &args, int threads);

// One parallel task: index = chunk of kLinearChunk outputs.
constexpr int64_t kLinearChunk = 32;
using LinearKernel = void (*)(const void *args, int64_t index, int worker);

namespace portable {
extern const LinearKernel linear;
}
namespace avx2 {
extern const LinearKernel linear;
}
namespace avx512 {
extern const LinearKernel linear;
}

} // namespace tw
