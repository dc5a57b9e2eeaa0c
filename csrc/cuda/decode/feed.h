// The warps of `attend` that feed the multiplying ones. One takes units and fetches their tiles of K
// and V by bulk copies, page by page; one for each warpgroup gathers its queries. They run ahead over
// the ends of units, so that the ring of tiles never drains. Device code.
#pragma once

#include "cuda/decode/shared.h"
#include "cuda/decode/trie_decode.h"
#include "cuda/hopper/barrier.h"
#include "cuda/hopper/chain.h"
#include "cuda/hopper/copy.h"

namespace tw::cuda {

constexpr unsigned kWarp = 0xffffffff; // all its lanes

// What a unit is told by: written by one lane, read by whole warps.
template <int D>
__device__ void announce(AttendShared<D> &shared, Ring<kUnitsAhead> &ring, const Unit &unit) {
  wait_hidden(shared.unit_empty[ring.stage], ring.parity ^ 1);
  if (threadIdx.x % 32 == 0) shared.units[ring.stage] = unit;
  release(shared.unit_full[ring.stage]);
  ring.advance();
}

// The warp that takes units, as fast as they are done: a block that has long ones takes fewer.
template <int D> __device__ void fetch(const AttendArguments &a, AttendShared<D> &shared) {
  constexpr int kSlots = AttendShared<D>::kSlots;
  const int lane = threadIdx.x % 32;
  const Box box = box_of_lane(lane, a.page_size);
  const int units = a.num_items * a.kv_heads * a.row_tiles;
  const auto take = [&] { return lane == 0 ? atomicAdd(a.next_unit, 1) : 0; };
  Ring<kUnitsAhead> announced;
  int turn = 0;
  for (int taken = take();;) {
    const int index = __shfl_sync(kWarp, taken, 0);
    if (index >= units) break;
    const Place place = place_of(index, a.row_tiles, a.kv_heads);
    const DecodeItem item = a.items[place.item];
    if (item.end_row == item.first_row) break; // padding, as is what comes after
    const int rows = rows_of_unit(item, a.group, place.first_m);
    if (rows <= 0) {
      taken = take();
      continue;
    }
    announce(shared, announced, {item, place.head, place.first_m, turn});
    // A narrow unit is the only one to read its keys: they make room in L2 for those of wide ones.
    const Reuse reuse = is_wide(rows) ? Reuse::likely : Reuse::none;
    const int32_t *pages = a.pages + item.first_page;
    // Read a tile ahead. Negative: the lane has no keys to copy.
    const auto page_of_tile = [&](int first_key) {
      const int key = first_key + box.key;
      return box.strip * kBoxColumns < D && key < item.num_keys ? pages[key / a.page_size] : -1;
    };
    int page = page_of_tile(0);
    for (int first_key = 0; first_key < item.num_keys; first_key += kTileKeys) {
      const int next_page = page_of_tile(first_key + kTileKeys);
      // No sooner, or a unit would wait here while other blocks have nothing to do.
      if (first_key + kTileKeys >= item.num_keys) taken = take();
      for (const TensorMap *map : {&a.k, &a.v}) {
        const auto [slot, parity] = Ring<kSlots>::at(turn);
        wait_hidden(shared.tile_empty[slot], parity ^ 1);
        if (lane == 0)
          arrive_expecting(shared.tile_full[slot],
                           arriving_bytes(item.num_keys - first_key, a.page_size, D));
        __syncwarp();
        if (page >= 0)
          load_box(*map, shared.tile_full[slot], reuse,
                   reinterpret_cast<char *>(shared.tiles[slot]) + box.offset(),
                   box.strip * kBoxColumns, place.head, (first_key + box.key) % a.page_size, page);
        ++turn;
      }
      page = next_page;
    }
  }
  announce(shared, announced, {{}, -1});
  let_next_launch_begin();
}

// The warp that gathers the queries of a warpgroup: rows of a unit stand anywhere in q.
template <class Element, int D>
__device__ void gather(const AttendArguments &a, AttendShared<D> &shared, int warpgroup) {
  const int lane = threadIdx.x % 32, heads = a.kv_heads * a.group;
  Ring<kUnitsAhead> announced;
  Ring<1> part;
  for (int sequence = 0;; ++sequence) {
    wait_hidden(shared.unit_full[announced.stage], announced.parity);
    const Unit unit = shared.units[announced.stage];
    release(shared.unit_empty[announced.stage]);
    announced.advance();
    if (unit.head < 0) break;
    const DecodeItem &item = unit.item;
    const int rows = rows_of_unit(item, a.group, unit.first_m);
    const int first = first_row_of(rows, sequence, warpgroup);
    if (first < 0) continue;
    const int count = min(rows - first, kWarpgroupRows);

    int64_t from[2], result[2]; // of tile rows `lane` and `lane` + 32
    int visible[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      from[h] = result[h] = 0, visible[h] = item.num_keys; // a row that is not there hides nothing
      if (lane + 32 * h >= count) continue;
      const int m = unit.first_m + first + lane + 32 * h;
      const int row = item.first_row + row_of(m, a.group), head = head_of(m, a.group, unit.head);
      const int caller_row = a.rows[row];
      const bool is_only_one = a.merge_ptr[row + 1] - a.merge_ptr[row] == 1;
      visible[h] = visible_keys(item, a.positions[row]);
      from[h] = caller_row * a.q.row_stride + head * a.q.head_stride;
      result[h] = result_of(is_only_one ? caller_row : item.first_slot + row - item.first_row, heads,
                            head, is_only_one);
    }

    wait_hidden(shared.part_empty[warpgroup], part.parity ^ 1);
    constexpr int kChunks = D / kChunkColumns, kRowsAtOnce = 32 / kChunks;
    for (int tile_row = 0; tile_row < count; tile_row += kRowsAtOnce) {
      const int row = tile_row + lane / kChunks, chunk = lane % kChunks;
      const int64_t start = __shfl_sync(kWarp, tile_row < 32 ? from[0] : from[1], row % 32);
      if (row < count)
        start_copy_16(&shared.q[warpgroup][chunk_offset(row, chunk)],
                      static_cast<const Element *>(a.q.data) + start + chunk * kChunkColumns);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      shared.visible[warpgroup][lane + 32 * h] = visible[h];
      shared.results[warpgroup][lane + 32 * h] = result[h];
    }
    if (lane == 0)
      shared.parts[warpgroup] = {count, item.num_keys, unit.turn, is_wide(rows)};
    finish_copies();
    publish();
    release(shared.part_full[warpgroup]);
    part.advance();
  }
  wait_hidden(shared.part_empty[warpgroup], part.parity ^ 1);
  if (lane == 0) shared.parts[warpgroup] = {};
  release(shared.part_full[warpgroup]);
}

} // namespace tw::cuda
