// What the emulated kernels share: a Hopper GPU's copy engine, its numbers and its warpgroup products,
// played after the PTX ISA in double precision. The index arithmetic is that of csrc/cuda.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/driver.h"
#include "cuda/hopper/index.h"

namespace tw::cuda {

struct Launch {
  std::string kernel; // its name
  int blocks, threads, shared_bytes;
  const void *arguments;
};

// Each runs the launch if the kernel is one of its own. Throws std::logic_error if one of them would
// wait for bytes that do not arrive, or read what is not there.
bool emulate_attention(const Launch &launch);
bool emulate_decode(const Launch &launch);

inline void require(bool holds, const char *what) {
  if (!holds) throw std::logic_error(what);
}

// What cuTensorMapEncodeTiled was asked for.
struct Map {
  int rank;
  char *data;
  int64_t sizes[5], strides[5], box[5]; // strides in bytes

  static const Map &of(const TensorMap &map) {
    return *reinterpret_cast<const Map *>(map.opaque[0]);
  }
};

// cp.async.bulk.tensor between the box at `at` and the 2-byte elements from tile[first] on, in the
// 128-byte swizzle. What lies outside the tensor is 0, and not stored. Returns the bytes.
inline int copy_box(const Map &map, const std::vector<int64_t> &at, uint16_t *tile, int first,
                    bool store = false) {
  require(first * 2 % 128 == 0, "a box does not start at a multiple of 128 bytes");
  require(static_cast<int>(at.size()) == map.rank, "coordinates of another rank");
  int64_t count = 1;
  for (int i = 0; i < map.rank; ++i) count *= map.box[i];
  for (int64_t n = 0; n < count; ++n) {
    char *element = map.data;
    bool inside = true;
    int64_t rest = n;
    for (int i = 0; i < map.rank; rest /= map.box[i++]) {
      const int64_t index = at[i] + rest % map.box[i];
      inside = inside && index >= 0 && index < map.sizes[i];
      element += index * (i ? map.strides[i] : 2);
    }
    const int byte = static_cast<int>(first + n) * 2;
    uint16_t &there = tile[(byte ^ (byte >> 7 & 7) << 4) / 2];
    if (!store) there = 0;
    if (inside) std::memcpy(store ? element : reinterpret_cast<char *>(&there),
                            store ? reinterpret_cast<char *>(&there) : element, 2);
  }
  return static_cast<int>(count) * 2;
}

inline double value(bool bfloat16, uint16_t bits) {
  if (bfloat16) {
    const uint32_t wide = uint32_t{bits} << 16;
    float result;
    std::memcpy(&result, &wide, 4);
    return result;
  }
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double magnitude = exponent == 31  ? (fraction ? NAN : HUGE_VAL)
                           : exponent == 0 ? std::ldexp(fraction, -24)
                                           : std::ldexp(1024 + fraction, exponent - 25);
  return bits >> 15 ? -magnitude : magnitude;
}

inline uint16_t rounded(bool bfloat16, double x) {
  const float wide = static_cast<float>(x);
  if (!bfloat16) {
    const _Float16 half = wide;
    uint16_t bits;
    std::memcpy(&bits, &half, 2);
    return bits;
  }
  uint32_t bits;
  std::memcpy(&bits, &wide, 4);
  return std::isnan(wide) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// A tile [rows, columns] as products read it from shared memory.
struct Matrix {
  int rows, columns;
  std::vector<double> values;
  Matrix(int rows, int columns) : rows(rows), columns(columns), values(rows * columns) {}
  Matrix(bool bfloat16, const uint16_t *tile, int rows, int columns) : Matrix(rows, columns) {
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < columns; ++c)
        values[r * columns + c] = value(bfloat16, tile[box_offset(rows, r, c)]);
  }
  double *row(int r) { return &values[r * columns]; }
  const double *row(int r) const { return &values[r * columns]; }
};

// A B^T of a warpgroup, A with 64 rows: calls f(row, column, product) for every element that one of
// the 128 threads holds.
template <class F> void for_each_product(const Matrix &a, const Matrix &b, F f) {
  for (int thread = 0; thread < kWarpgroupThreads; ++thread)
    for (int e = 0; e < b.rows / 2; ++e) {
      const int row = product_row(thread, e), column = product_column(thread, e);
      double sum = 0;
      for (int c = 0; c < a.columns; ++c) sum += a.row(row)[c] * b.row(column)[c];
      f(row, column, sum);
    }
}

// sum += factor * row
inline void add(double *sum, double factor, const double *row, int columns) {
  for (int c = 0; c < columns; ++c) sum[c] += factor * row[c];
}

// Online softmax of the rows of a warpgroup; scores in base 2.
struct SoftmaxRows {
  Matrix out; // times sum
  std::vector<double> max, sum;
  explicit SoftmaxRows(int columns)
      : out(kWarpgroupRows, columns), max(kWarpgroupRows, -1e30), sum(kWarpgroupRows) {}

  void see(int row, double score, const double *values) {
    const double next = std::fmax(max[row], score), shrink = std::exp2(max[row] - next);
    const double weight = std::exp2(score - next);
    max[row] = next, sum[row] = sum[row] * shrink + weight;
    for (int c = 0; c < out.columns; ++c)
      out.row(row)[c] = out.row(row)[c] * shrink + weight * values[c];
  }
};

} // namespace tw::cuda
