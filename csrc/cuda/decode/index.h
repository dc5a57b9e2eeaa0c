// Sizes and index arithmetic of the decode kernels. Compiled by the kernels, the host and the
// emulation in tests/kernels.
#pragma once

#include <cstdint>

#include "cuda/hopper/index.h"
#include "trie/decode_plan.h"

namespace tw::cuda {

// Keys of a tile. In shared memory it is [kTileKeys, head_dim], strips of kBoxColumns columns,
// swizzled (box_offset).
constexpr int kTileKeys = 128;
constexpr int kStripBytes = kBoxColumns * kElementBytes; // of a row
constexpr int kRingBytes = 192 * 1024;                   // of tiles of K and V in flight

TW_INDEX int tile_bytes(int head_dim) { return kTileKeys * head_dim * kElementBytes; }
TW_INDEX int ring_slots(int head_dim) { return kRingBytes / tile_bytes(head_dim); }

// Element of a tile of queries at which a row has columns [8 chunk, 8 chunk + 8).
TW_INDEX int chunk_offset(int row, int chunk) {
  return box_offset(kWarpgroupRows, row, chunk * kChunkColumns);
}
// The same of a tile of keys or values.
TW_INDEX int key_chunk_offset(int key, int chunk) {
  return box_offset(kTileKeys, key, chunk * kChunkColumns);
}

constexpr int kRowWarpgroups = 2; // that multiply, each a tile of 64 matrix rows; one more feeds them
constexpr int kUnitRows = kRowWarpgroups * kWarpgroupRows;
constexpr int kAttendThreads = kWarpgroupThreads * (1 + kRowWarpgroups);
constexpr int kUnitsAhead = 4; // that the feeding warps tell one another of
constexpr int kWriteThreads = 128; // a block a row
constexpr int kMergeThreads = 128; // a warp a row and head

// What a block does at a time: matrix rows [first_m, first_m + kUnitRows) of an item, for one KV
// head. Units of one item are neighbours: they read the same pages.
struct Place {
  int item, head, first_m;
};
TW_INDEX Place place_of(int unit, int row_tiles, int kv_heads) {
  return {unit / (row_tiles * kv_heads), unit / row_tiles % kv_heads, unit % row_tiles * kUnitRows};
}

// Matrix row m of an item is a query row of it and a query head of the group.
TW_INDEX int row_of(int m, int group) { return m / group; }
TW_INDEX int head_of(int m, int group, int kv_head) { return kv_head * group + m % group; }

// Matrix rows that a unit has; none, or less, if the item ends before it.
TW_INDEX int rows_of_unit(const DecodeItem &item, int group, int first_m) {
  const int rows = (item.end_row - item.first_row) * group - first_m;
  return rows < kUnitRows ? rows : kUnitRows;
}
// Both warpgroups share a wide unit; narrow ones they take in turn, so that one begins and ends its
// unit while the other multiplies.
TW_INDEX bool is_wide(int rows) { return rows > kWarpgroupRows; }
// First row of the unit that a warpgroup multiplies, -1 if none. `sequence`: of the block's units.
TW_INDEX int first_row_of(int rows, int sequence, int warpgroup) {
  if (is_wide(rows)) return warpgroup * kWarpgroupRows;
  return sequence % kRowWarpgroups == warpgroup ? 0 : -1;
}

// A row sees the item's keys [0, visible_keys); none if that is not positive.
TW_INDEX int visible_keys(const DecodeItem &item, int position) {
  const int up_to_itself = position + 1 - item.first_position;
  return up_to_itself < item.num_keys ? up_to_itself : item.num_keys;
}

// Where a matrix row's result goes, in units of head_dim elements: to its partial slot, or, if it
// has but one, which the sign says, straight to the caller's row.
TW_INDEX int64_t result_of(int64_t row, int heads, int head, bool is_only_one) {
  return is_only_one ? ~(row * heads + head) : row * heads + head;
}

// A bulk copy: the keys that one page has in a tile, up to 64, kBoxColumns columns of them.
struct Box {
  int strip, key; // first key in the tile
  TW_INDEX int offset() const { // bytes
    return strip * (kTileKeys * kStripBytes) + key * kStripBytes;
  }
};
TW_INDEX int box_keys(int page_size) { return page_size < 64 ? page_size : 64; }
TW_INDEX Box box_of_lane(int lane, int page_size) {
  const int boxes = kTileKeys / box_keys(page_size);
  return {lane / boxes, lane % boxes * box_keys(page_size)};
}
// Bytes that arrive for a tile: whole boxes, as many as hold some of its `keys` keys.
TW_INDEX int arriving_bytes(int keys, int page_size, int head_dim) {
  const int box = box_keys(page_size);
  const int rounded = (keys + box - 1) / box * box;
  return (rounded < kTileKeys ? rounded : kTileKeys) * head_dim * kElementBytes;
}

} // namespace tw::cuda
