// Where Hopper's copy engine and its warpgroup products have their elements, and where a ring of
// buffers stands. Compiled by the kernels, the host and the emulation in tests/kernels.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define TW_INDEX __host__ __device__ constexpr
#else
#define TW_INDEX constexpr
#endif

namespace tw::cuda {

// [rows, heads, head_dim] of 2-byte elements, last dimension contiguous; strides in elements.
struct Heads {
  void *data; // null: not there
  int64_t row_stride, head_stride;
};

constexpr int kElementBytes = 2;
constexpr int kChunkColumns = 16 / kElementBytes; // of the 16 bytes that one thread reads at a time
constexpr int kBoxColumns = 64; // of one bulk copy: 128 bytes, the span of the swizzle

constexpr int kWarpgroupThreads = 128;
constexpr int kWarpgroupRows = 64; // of one product (wgmma)

// Registers of a thread at the start of a kernel whose blocks of so many threads have a
// multiprocessor to themselves. setmaxnreg moves registers between the warpgroups of a block, within
// what its launch got, not within the 65536 there are: it waits for ever for more.
TW_INDEX int launch_registers(int threads) { return 65536 / threads / 8 * 8; }

// Element of a tile [rows, columns] in shared memory at which (row, column) is: boxes of 64 columns
// one after the other, rows of 128 bytes whose 16-byte chunks are permuted by the row
// (CU_TENSOR_MAP_SWIZZLE_128B in the CUDA driver API). Tiles start at multiples of 1024 bytes.
TW_INDEX int box_offset(int rows, int row, int column) {
  const int chunk = (column % kBoxColumns / kChunkColumns) ^ (row % 8);
  return (column / kBoxColumns * rows + row) * kBoxColumns + chunk * kChunkColumns +
         column % kChunkColumns;
}

// Row and column of element e of a thread's share of a warpgroup's product (PTX ISA, wgmma with m64:
// D). Elements e and e + 1 of even e are neighbours in a row; a thread has two rows, 8 apart, and
// four threads share them.
TW_INDEX int product_row(int thread, int e) {
  return thread / 32 * 16 + thread % 32 / 4 + e / 2 % 2 * 8;
}
TW_INDEX int product_column(int thread, int e) { return e / 4 * 8 + thread % 4 * 2 + e % 2; }

// A position in a ring of kStages buffers, each with two barriers in shared memory (PTX ISA,
// mbarrier): full, once its bytes have arrived, and empty, once every reader has released it. Whoever
// reads the buffer waits for the phase of full that has `parity`, whoever fills it for that of empty
// that has the opposite one: the phase before a barrier's first counts as complete.
template <int kStages> struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  // After that many fills.
  static TW_INDEX Ring at(int fills) {
    return {fills % kStages, static_cast<uint32_t>(fills / kStages % 2)};
  }
  TW_INDEX void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

} // namespace tw::cuda
