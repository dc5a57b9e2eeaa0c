#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "isa.h"
#include "threads.h"

namespace tw {

namespace {

constexpr int64_t kBlock = 256;    // tokens whose weights are added up together at first
constexpr int64_t kOneThread = 1e5; // logits below which a second thread does not pay
constexpr float kCutOff = -std::numeric_limits<float>::infinity();

const SamplingKernels &kernels() {
  switch (chosen_isa()) {
#if defined(__x86_64__)
  case Isa::avx512bf16: // what it adds does not serve float32
  case Isa::avx512: return avx512::sampling;
  case Isa::avx2: return avx2::sampling;
#endif
  default: return portable::sampling;
  }
}

int threads_for(const SamplingArgs &args, int threads) {
  return args.rows * args.vocabulary < kOneThread ? 1 : threads;
}

// Orders as the numbers do, -0 with 0.
uint32_t order(float x) {
  uint32_t bits;
  x = x == 0 ? 0 : x;
  memcpy(&bits, &x, sizeof bits);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

// The last token that is kept, in the order: likelier ones first, of equal ones the lower id.
struct Last {
  uint32_t key;
  int64_t id;
};

// Of the shortest run of first tokens whose amounts add up to the target.
template <class Amount>
Last last_of(const float *x, int64_t vocabulary, int64_t target, const Amount &amount) {
  constexpr int kBits = 12; // of the key, that name a bucket
  std::vector<int64_t> amounts(1 << kBits);
  for (int64_t i = 0; i < vocabulary; ++i) amounts[order(x[i]) >> (32 - kBits)] += amount(i);
  int64_t before = 0;
  int bucket = (1 << kBits) - 1;
  for (; bucket > 0 && before + amounts[bucket] < target; --bucket) before += amounts[bucket];
  std::vector<Last> members;
  for (int64_t i = 0; i < vocabulary; ++i)
    if (const uint32_t key = order(x[i]); int(key >> (32 - kBits)) == bucket)
      members.push_back({key, i});
  std::sort(members.begin(), members.end(), [](const Last &a, const Last &b) {
    return a.key != b.key ? a.key > b.key : a.id < b.id;
  });
  for (const Last &member : members)
    if ((before += amount(member.id)) >= target) return member;
  return {0, vocabulary}; // a row without a maximum
}

void cut_off(float *x, int64_t vocabulary, Last last) {
  for (int64_t i = 0; i < vocabulary; ++i)
    if (const uint32_t key = order(x[i]); key < last.key || (key == last.key && i > last.id))
      x[i] = kCutOff;
}

void truncate_row(float *x, int64_t vocabulary, const Truncation &truncation) {
  const SamplingKernels &isa = kernels();
  const float most = isa.largest(x, vocabulary);
  std::vector<int64_t> weights(vocabulary);
  if (truncation.top_k < vocabulary)
    cut_off(x, vocabulary, last_of(x, vocabulary, truncation.top_k, [](int64_t) { return 1; }));
  isa.weigh(x, vocabulary, most, weights.data());
  if (truncation.top_p < 1) {
    const int64_t mass = std::accumulate(weights.begin(), weights.end(), int64_t{0});
    const int64_t target = std::max(1.0, std::ceil(double(mass) * truncation.top_p));
    cut_off(x, vocabulary,
            last_of(x, vocabulary, target, [&](int64_t i) { return weights[i]; }));
  }
  for (int64_t i = 0; i < vocabulary; ++i)
    if (weights[i] < truncation.min_weight) x[i] = kCutOff;
}

int64_t draw_row(const float *x, int64_t vocabulary, double point) {
  const SamplingKernels &isa = kernels();
  const float most = isa.largest(x, vocabulary);
  std::vector<int64_t> sums((vocabulary + kBlock - 1) / kBlock);
  int64_t weights[kBlock], total = 0;
  const auto weigh = [&](int64_t block) {
    const int64_t n = std::min(kBlock, vocabulary - block * kBlock);
    isa.weigh(x + block * kBlock, n, most, weights);
    return n;
  };
  for (size_t block = 0; block < sums.size(); ++block) {
    const int64_t n = weigh(block);
    sums[block] = std::accumulate(weights, weights + n, int64_t{0});
    total += sums[block];
  }
  if (total == 0) return 0;
  int64_t left = double(total) * point, block = 0; // weight before the point
  for (; left >= sums[block]; ++block) left -= sums[block];
  weigh(block);
  int64_t i = 0;
  for (; left >= weights[i]; ++i) left -= weights[i];
  return block * kBlock + i;
}

struct Draws {
  const SamplingArgs &args;
  const double *points;
  int64_t *tokens;
};

struct Truncations {
  const SamplingArgs &args;
  const Truncation &truncation;
};

} // namespace

void truncate_logits(const SamplingArgs &args, const Truncation &truncation, int threads) {
  const Truncations all{args, truncation};
  const Task task = [](const void *context, int64_t row, int) {
    const auto &[args, truncation] = *static_cast<const Truncations *>(context);
    truncate_row(args.logits + row * args.vocabulary, args.vocabulary, truncation);
  };
  parallel_for(args.rows, threads_for(args, threads), task, &all);
}

void draw_tokens(const SamplingArgs &args, const double *points, int64_t *tokens, int threads) {
  const Draws all{args, points, tokens};
  const Task task = [](const void *context, int64_t row, int) {
    const auto &[args, points, tokens] = *static_cast<const Draws *>(context);
    tokens[row] = draw_row(args.logits + row * args.vocabulary, args.vocabulary, points[row]);
  };
  parallel_for(args.rows, threads_for(args, threads), task, &all);
}

} // namespace tw
