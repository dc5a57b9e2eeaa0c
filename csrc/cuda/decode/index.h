// Sizes and index arithmetic of the decode kernels. Compiled by the kernels, the host and the
// emulation in tests/kernels.
#pragma once

#include <cstdint>

#include "cuda/hopper/index.h"
#include "trie/decode_plan.h"

namespace tw::cuda {

// A tile is kTile matrix rows of an item, or kTile keys: a warpgroup's product is 64 rows high, and
// pages of 16, 32 or n x 64 keys fill it or are cut into it. In shared memory a tile
// [kTile, head_dim] is strips of kBoxColumns columns, swizzled (box_offset).
constexpr int kTile = 64;
constexpr int kStripBytes = kBoxColumns * kElementBytes; // of a row

TW_INDEX int tile_bytes(int head_dim) { return kTile * head_dim * kElementBytes; }

// Byte of a tile at which a row has columns [8 chunk, 8 chunk + 8).
TW_INDEX int chunk_offset(int row, int chunk) {
  return box_offset(kTile, row, chunk * kChunkColumns) * kElementBytes;
}

constexpr int kMaxWarpgroups = 2; // that multiply, each a tile of matrix rows

// Two blocks to a multiprocessor, where their registers fit it: one multiplies while the other
// begins or ends. Together they keep 192 KiB of K and V in flight, of the 227 that there are.
TW_INDEX int blocks_per_multiprocessor(int head_dim, int warpgroups) {
  return head_dim == 128 && warpgroups == 2 ? 1 : 2;
}
TW_INDEX int ring_slots(int head_dim, int warpgroups) {
  return 192 * 1024 / blocks_per_multiprocessor(head_dim, warpgroups) / tile_bytes(head_dim);
}
// Of the barrier that a slot is released through: one from each warp that multiplies.
TW_INDEX int releases(int warpgroups) { return warpgroups * (kWarpgroupThreads / 32); }
// The warpgroups, and a warp that fetches.
TW_INDEX int partial_threads(int warpgroups) { return warpgroups * kWarpgroupThreads + 32; }
// Tiles of q, the ring, and two 8-byte barriers for each of its slots.
TW_INDEX int partial_shared_bytes(int head_dim, int warpgroups) {
  const int slots = ring_slots(head_dim, warpgroups);
  return (warpgroups + slots) * tile_bytes(head_dim) + 2 * 8 * slots;
}

constexpr int kWriteThreads = 128; // a block a row
constexpr int kMergeThreads = 128; // a warp a row and head

// What a block of `partial` does: matrix rows of an item from first_m on, for one KV head. Row
// blocks run fastest: those of one item fetch the same pages, all but the first from L2.
struct Part {
  int item, head, first_m;
};
TW_INDEX Part part_of_block(int block, int row_blocks, int kv_heads, int warpgroups) {
  return {block / (row_blocks * kv_heads), block / row_blocks % kv_heads,
          block % row_blocks * (warpgroups * kTile)};
}

// Matrix row m of an item is a query row of it and a query head of the group.
TW_INDEX int row_of(int m, int group) { return m / group; }
TW_INDEX int head_of(int m, int group, int kv_head) { return kv_head * group + m % group; }

// A row sees the item's keys [0, visible_keys); none if that is not positive.
TW_INDEX int visible_keys(const DecodeItem &item, int position) {
  const int up_to_itself = position + 1 - item.first_position;
  return up_to_itself < item.num_keys ? up_to_itself : item.num_keys;
}

// A bulk copy: the keys that one page has in a tile, kBoxColumns columns of them.
struct Box {
  int strip, key; // first key in the tile
  TW_INDEX int offset() const { return strip * (kTile * kStripBytes) + key * kStripBytes; }
};
TW_INDEX int box_keys(int page_size) { return page_size < kTile ? page_size : kTile; }
TW_INDEX Box box_of_lane(int lane, int page_size) {
  const int boxes = kTile / box_keys(page_size);
  return {lane / boxes, lane % boxes * box_keys(page_size)};
}
// Bytes that arrive for a tile: whole boxes, as many as hold some of its `keys` keys.
TW_INDEX int arriving_bytes(int keys, int page_size, int head_dim) {
  const int box = box_keys(page_size);
  const int rounded = (keys + box - 1) / box * box;
  return (rounded < kTile ? rounded : kTile) * head_dim * kElementBytes;
}

} // namespace tw::cuda
