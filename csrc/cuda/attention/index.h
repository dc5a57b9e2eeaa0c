// Sizes and index arithmetic of the trie attention kernels. Compiled by the kernels, the host and the
// emulation in tests/kernels.
#pragma once

#include <cstdint>

#include "cuda/hopper/index.h"

namespace tw::cuda {

constexpr int kConsumers = 2;      // warpgroups that compute; one more warp only copies
constexpr int kThreads = kWarpgroupThreads * (1 + kConsumers);
constexpr int kOwnRows = kConsumers * kWarpgroupRows; // rows that a thread block owns at a time
constexpr int kPadding = 128; // per-token arrays of int32 and float32 are padded to a multiple
constexpr int kDeltaThreads = 256;

// Tiles of `rows` rows stream past the rows that a thread block owns, up to `stages` in flight.
struct Stream {
  int rows, stages;
};
TW_INDEX Stream forward_stream(int head_dim) { return {128, head_dim == 64 ? 4 : 2}; }
TW_INDEX Stream dq_stream(int head_dim) {
  return head_dim == 64 ? Stream{128, 4} : Stream{64, 3};
}
TW_INDEX Stream dkv_stream(int head_dim) { return {64, head_dim == 64 ? 4 : 2}; }

TW_INDEX int64_t padded(int64_t tokens) { return (tokens + kPadding - 1) / kPadding * kPadding; }

// Rows that a thread block of the delta kernel takes, each by head_dim / 8 neighbouring threads.
TW_INDEX int delta_rows(int head_dim) { return kDeltaThreads / (head_dim / kChunkColumns); }

// The trie mask (docs/architecture.md, fact 1).
TW_INDEX bool visible(int row, int column, int column_end) {
  return column <= row && row < column_end;
}

// The tile that a thread block takes in one round of a persistent grid. Tiles come longest first and
// are dealt forth in even rounds, back in odd ones: a block that got a longer tile gets a shorter
// one next.
TW_INDEX int tile_of(int round, int blocks, int block) {
  return round * blocks + (round % 2 ? blocks - 1 - block : block);
}

// The CSR half of a block schedule (trie/schedule.h).
struct RowSchedule {
  const int32_t *row_ptr, *full_end, *kv_blocks;
  const int32_t *order; // row blocks, longest first
};

// What a thread block does with one head's rows [first_row, first_row + kOwnRows): KV blocks
// kv_blocks[begin, end), those from `partial` on under the mask.
struct RowTile {
  int head, first_row, begin, partial, end;
};
TW_INDEX RowTile row_tile(const RowSchedule &schedule, int heads, int tile) {
  const int block = schedule.order[tile / heads];
  return {tile % heads, block * kOwnRows, schedule.row_ptr[block], schedule.full_end[block],
          schedule.row_ptr[block + 1]};
}

// Its other half.
struct ColumnSchedule {
  const int32_t *q_range;
  const int32_t *order; // KV blocks, longest first
};

// What a thread block does with one KV head's columns [first_column, first_column + kOwnRows): row
// blocks [first, last) of every query head of the group, those in [full_first, full_last) without a
// mask. (Rows beyond N of a full block are zero in q, dout, lse2 and delta, and add nothing.)
struct ColumnTile {
  int kv_head, first_column, first, full_first, full_last, last;
  TW_INDEX bool is_masked(int block) const { return block < full_first || block >= full_last; }
};
TW_INDEX ColumnTile column_tile(const ColumnSchedule &schedule, int kv_heads, int tile) {
  const int block = schedule.order[tile / kv_heads];
  const int32_t *range = schedule.q_range + 4 * block;
  return {tile % kv_heads, block * kOwnRows, range[0], range[1], range[2], range[3]};
}

} // namespace tw::cuda
