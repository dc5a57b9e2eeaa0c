#include "linear.h"

#include "isa.h"
#include "threads.h"

namespace tw {

namespace {

// Below this much work the hand-off to other threads, 10 to 15 us where they sleep when idle, does
// not pay: at 8e5 two take as long as one (30 us, two Xeon cores held to AVX2), at 1.2e6 0.8 of it.
// In multiply-adds; fetching a weight counts as much as kFetchRows rows.
constexpr double kOneThread = 1e6;
constexpr int64_t kFetchRows = 4;

LinearKernel kernel() {
  switch (chosen_isa()) {
#if defined(__x86_64__)
  case Isa::avx512bf16: // what it adds does not serve float32
  case Isa::avx512: return avx512::linear;
  case Isa::avx2: return avx2::linear;
#endif
  default: return portable::linear;
  }
}

} // namespace

void few_row_linear(const LinearArgs &args, int threads) {
  const double work = 1.0 * (kFetchRows + args.rows) * args.inputs * args.outputs;
  const int64_t chunks = (args.outputs + kLinearChunk - 1) / kLinearChunk;
  parallel_for(chunks, work < kOneThread ? 1 : threads, kernel(), &args);
}

} // namespace tw
