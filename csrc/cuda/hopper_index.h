// Where Hopper's copy engine and its warpgroup products have their elements: what all kernels here
// share. Kernels, host and the emulations that test them (tests/kernels) compile it.
#pragma once

#ifdef __CUDACC__
#define TW_INDEX __host__ __device__ constexpr
#else
#define TW_INDEX constexpr
#endif

namespace tw::cuda {

constexpr int kBoxColumns = 64; // of one bulk copy, two bytes each: 128, the span of the swizzle

// Where the copy engine puts an element of a tile, in elements: boxes of 64 columns one after the
// other, rows of 128 bytes, whose 16-byte pieces are permuted by the row (CUtensorMapSwizzle).
TW_INDEX int box_offset(int rows, int row, int column) {
  const int piece = (column % kBoxColumns / 8) ^ (row % 8);
  return (column / kBoxColumns * rows + row) * kBoxColumns + piece * 8 + column % 8;
}

// Element e of a thread's share of a warpgroup's product (PTX ISA, wgmma with m64: D). Elements e
// and e + 1 of even e are neighbours in a row; a thread has two rows, and four threads share them.
TW_INDEX int product_row(int thread, int e) {
  return thread / 32 * 16 + thread % 32 / 4 + e / 2 % 2 * 8;
}
TW_INDEX int product_column(int thread, int e) { return e / 4 * 8 + thread % 4 * 2 + e % 2; }

} // namespace tw::cuda
