// Drawing tokens from logits in whole numbers (tw_kernels/sampling/op.py has the definition): the
// same on every instruction set, and on a GPU.
#pragma once

#include <cstdint>

namespace tw {

struct SamplingArgs {
  int64_t rows, vocabulary;
  float *logits; // [rows, vocabulary], tempered
};

struct Truncation {
  int64_t top_k;      // at least 1; the vocabulary or more: all
  double top_p;       // 1: all
  int64_t min_weight; // 0: all
};

// Puts -inf in place of what is cut off. On at most `threads` threads.
void truncate_logits(const SamplingArgs &args, const Truncation &truncation, int threads);

// tokens[r] is where points[r], in [0, 1), falls in the cumulative weights of row r; 0 in a row
// without any. On at most `threads` threads.
void draw_tokens(const SamplingArgs &args, const double *points, int64_t *tokens, int threads);

// What depends on the instruction set.
struct SamplingKernels {
  float (*largest)(const float *x, int64_t n); // of those that are not NaN; -inf if there are none
  // Of a row, or a part of it, whose largest value is `most`.
  void (*weigh)(const float *x, int64_t n, float most, int64_t *weights);
};

namespace portable {
extern const SamplingKernels sampling;
}
namespace avx2 {
extern const SamplingKernels sampling;
}
namespace avx512 {
extern const SamplingKernels sampling;
}

} // namespace tw
