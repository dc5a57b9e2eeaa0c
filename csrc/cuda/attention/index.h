// Sizes and index arithmetic of the trie attention kernels. Compiled by the kernels, the host and the
// emulation in tests/kernels.
#pragma once

#include <cstdint>

#include "cuda/hopper/index.h"

namespace tw::cuda {

constexpr int kConsumers = 2;      // warpgroups that compute; one more warp only copies
constexpr int kThreads = kWarpgroupThreads * (1 + kConsumers);
constexpr int kOwnRows = kConsumers * kWarpgroupRows; // rows or columns that a thread block owns
constexpr int kPadding = 128; // per-token arrays of int32 and float32 are padded to a multiple
constexpr int kDeltaThreads = 256;

// How finely a launch follows its trie. A warpgroup always owns 64 rows; the two of a thread block,
// coarse: 128 consecutive rows of one head, and both walk the tiles that any of these rows sees;
// fine:   the same 64 rows of two query heads of a group, or 128 columns of which each warpgroup
//         leaves out the tiles of rows that its own 64 hide from. Streamed tiles have 64 rows.
enum class Grain { coarse, fine };

// Tiles of `rows` rows stream past the rows that a thread block owns, up to `stages` in flight.
struct Stream {
  int rows, stages;
};
TW_INDEX Stream forward_stream(int head_dim, Grain grain) {
  const int stages = head_dim == 64 ? 4 : 2;
  return grain == Grain::coarse ? Stream{128, stages} : Stream{64, 2 * stages};
}
TW_INDEX Stream dq_stream(int head_dim, Grain grain) {
  if (head_dim == 128) return {64, 3};
  return grain == Grain::coarse ? Stream{128, 4} : Stream{64, 8};
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

// Rows of a block of that schedule.
TW_INDEX int row_block(Grain grain) { return grain == Grain::coarse ? kOwnRows : kWarpgroupRows; }

// Tiles of a block of rows: one for each head, or for each two of a group.
TW_INDEX int row_tiles(Grain grain, int kv_heads, int group) {
  return kv_heads * (grain == Grain::coarse ? group : (group + 1) / 2);
}

// What a thread block does with its rows: KV blocks kv_blocks[begin, end) of one KV head, those from
// `partial` on under the mask. Where a group is odd, both warpgroups have its last head: they
// compute the same bits and store them twice.
struct RowTile {
  Grain grain;
  int kv_head, first_head, last_head, first_row, begin, partial, end;
  TW_INDEX int head(int warpgroup) const {
    const int head = first_head + (grain == Grain::fine ? warpgroup : 0);
    return head < last_head ? head : last_head;
  }
  TW_INDEX int row(int warpgroup) const {
    return first_row + (grain == Grain::coarse ? warpgroup * kWarpgroupRows : 0);
  }
};
TW_INDEX RowTile row_tile(Grain grain, const RowSchedule &schedule, int kv_heads, int group,
                          int tile) {
  const int tiles = row_tiles(grain, kv_heads, group), of_group = tiles / kv_heads;
  const int block = schedule.order[tile / tiles], kv_head = tile % tiles / of_group;
  const int first = kv_head * group, step = grain == Grain::coarse ? 1 : 2;
  return {grain,
          kv_head,
          first + tile % of_group * step,
          first + group - 1,
          block * row_block(grain),
          schedule.row_ptr[block],
          schedule.full_end[block],
          schedule.row_ptr[block + 1]};
}

// Its other half.
struct ColumnSchedule {
  const int32_t *q_range; // fine: of 64 columns each, an even number of them
  const int32_t *order;   // blocks of kOwnRows columns, longest first
};

// Which row blocks a warpgroup's columns meet: [first, last), those in [full_first, full_last)
// without a mask. (Rows beyond N of a full block are zero in q, dout, lse2 and delta, and add
// nothing.)
struct RowRange {
  int first, full_first, full_last, last;
  TW_INDEX bool has(int block) const { return block >= first && block < last; }
  TW_INDEX bool is_masked(int block) const { return block < full_first || block >= full_last; }
};

// What a thread block does with one KV head's columns [first_column, first_column + kOwnRows): row
// blocks [first, last) of every query head of the group stream past.
struct ColumnTile {
  Grain grain;
  int kv_head, block, first_column, first, last;
  TW_INDEX RowRange range(const ColumnSchedule &schedule, int warpgroup) const {
    const int own = grain == Grain::coarse ? block : kConsumers * block + warpgroup;
    const int32_t *range = schedule.q_range + 4 * own;
    return {range[0], range[1], range[2], range[3]};
  }
};
TW_INDEX ColumnTile column_tile(Grain grain, const ColumnSchedule &schedule, int kv_heads,
                                int tile) {
  const int block = schedule.order[tile / kv_heads];
  ColumnTile t{grain, tile % kv_heads, block, block * kOwnRows, 0, 0};
  // A column is seen from its own row on, so no gap lies between the ranges of two warpgroups.
  const RowRange upper = t.range(schedule, 0), lower = t.range(schedule, kConsumers - 1);
  t.first = upper.first, t.last = upper.last > lower.last ? upper.last : lower.last;
  return t;
}

} // namespace tw::cuda
