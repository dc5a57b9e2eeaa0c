// Shared memory of a block of `attend`. Plain C++: the host needs its size.
#pragma once

#include <cstdint>

#include "cuda/decode/index.h"

namespace tw::cuda {

// A unit as the warp that took it tells the warps that fetch its queries.
struct Unit {
  DecodeItem item;
  int32_t head; // -1: there are no more units
  int32_t first_m;
  int32_t turn; // of the ring of tiles at its first K; its first V is a turn later
};

// What a warpgroup does next: rows [0, rows) of its tile of queries with all keys of the item.
struct Part {
  int32_t rows, keys; // no keys: there is nothing more to do
  int32_t turn;
  int32_t is_wide; // the other warpgroup has a part of the same unit
};

// Tiles start at multiples of 1024 bytes (box_offset).
template <int D> struct alignas(1024) AttendShared {
  static constexpr int kSlots = ring_slots(D);
  uint16_t q[kRowWarpgroups][kWarpgroupRows * D];
  uint16_t tiles[kSlots][kTileKeys * D]; // a ring: K0 V0 K1 V1 ...
  int32_t visible[kRowWarpgroups][kWarpgroupRows]; // keys of each row
  int64_t results[kRowWarpgroups][kWarpgroupRows]; // result_of each row
  Part parts[kRowWarpgroups];
  Unit units[kUnitsAhead];
  // Barriers: the buffer is full, or empty.
  uint64_t tile_full[kSlots], tile_empty[kSlots];
  uint64_t part_full[kRowWarpgroups], part_empty[kRowWarpgroups]; // with q, visible and results
  uint64_t unit_full[kUnitsAhead], unit_empty[kUnitsAhead];
};
static_assert(sizeof(AttendShared<128>) <= 227 * 1024 && sizeof(AttendShared<64>) <= 227 * 1024);

constexpr int kWarps = kWarpgroupThreads / 32; // of a warpgroup
// Arrivals that release a tile: as many from the one warpgroup of a narrow unit as from the two of a
// wide one.
constexpr int kTileReleases = kRowWarpgroups * kWarps;

} // namespace tw::cuda
