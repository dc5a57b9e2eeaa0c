// The decode kernels (csrc/cuda/decode) in double precision: the items, pages and addresses of a
// launch, in one order.
#include <algorithm>

#include "cuda/decode/index.h"
#include "cuda/decode/shared.h"
#include "cuda/decode/trie_decode.h"
#include "cuda_emulation.h"

namespace tw::cuda {

namespace {

void write(const Launch &launch) {
  const auto &a = *static_cast<const WriteArguments *>(launch.arguments);
  *a.next_unit = 0;
  for (int block = 0; block < std::min(launch.blocks, a.num_rows); ++block) {
    const int slot = a.slots[block], row = a.rows[block];
    if (slot < 0) continue;
    const int64_t to = slot / a.page_size * a.kv.page_stride + slot % a.page_size * a.kv.slot_stride;
    for (int head = 0; head < a.kv_heads; ++head)
      for (const auto &[from, pages] : {std::pair{a.new_k, a.kv.k}, {a.new_v, a.kv.v}})
        std::memcpy(static_cast<uint16_t *>(pages) + to + head * a.kv.head_stride,
                    static_cast<const uint16_t *>(from.data) + row * from.row_stride +
                        head * from.head_stride,
                    a.head_dim * kElementBytes);
  }
}

// The keys or values [first_key, first_key + kTileKeys) of an item, of which `keys` exist.
Matrix load_tile(const TensorMap &map, const AttendArguments &a, const DecodeItem &item, int head,
                 int first_key, int keys, bool bfloat16, int head_dim) {
  std::vector<uint16_t> tile(kTileKeys * head_dim, 0xffff);
  int bytes = 0;
  for (int lane = 0; lane < 32; ++lane) {
    const Box box = box_of_lane(lane, a.page_size);
    const int key = first_key + box.key;
    if (box.strip * kBoxColumns >= head_dim || box.key >= keys) continue;
    bytes += copy_box(Map::of(map),
                      {box.strip * kBoxColumns, head, key % a.page_size,
                       a.pages[item.first_page + key / a.page_size]},
                      tile.data(), box.offset() / kElementBytes);
  }
  require(bytes == arriving_bytes(keys, a.page_size, head_dim),
          "a tile's barrier waits for other bytes than arrive");
  return {bfloat16, tile.data(), kTileKeys, head_dim};
}

// A warpgroup's rows of a unit, from matrix row first_m of the item on.
template <bool kBfloat16, int kHeadDim>
void attend(const AttendArguments &a, const DecodeItem &item, int head, int first_m, int count) {
  const int heads = a.kv_heads * a.group;
  std::vector<uint16_t> tile(kWarpgroupRows * kHeadDim, 0xffff);
  std::vector<int> visible(kWarpgroupRows, item.num_keys);
  std::vector<int64_t> results(count);
  for (int r = 0; r < count; ++r) {
    const int row = item.first_row + row_of(first_m + r, a.group);
    const int q_head = head_of(first_m + r, a.group, head);
    const bool is_only_one = a.merge_ptr[row + 1] - a.merge_ptr[row] == 1;
    visible[r] = visible_keys(item, a.positions[row]);
    results[r] = result_of(is_only_one ? a.rows[row] : item.first_slot + row - item.first_row, heads,
                           q_head, is_only_one);
    for (int chunk = 0; chunk < kHeadDim / kChunkColumns; ++chunk)
      std::memcpy(&tile[chunk_offset(r, chunk)],
                  static_cast<const uint16_t *>(a.q.data) + a.rows[row] * a.q.row_stride +
                      q_head * a.q.head_stride + chunk * kChunkColumns,
                  16);
  }
  const Matrix q(kBfloat16, tile.data(), kWarpgroupRows, kHeadDim);
  SoftmaxRows softmax(kHeadDim);
  for (int first = 0; first < item.num_keys; first += kTileKeys) {
    const auto load = [&](const TensorMap &map) {
      return load_tile(map, a, item, head, first, item.num_keys - first, kBfloat16, kHeadDim);
    };
    const Matrix k = load(a.k), v = load(a.v);
    for_each_product(q, k, [&](int r, int c, double s) {
      if (r < count && first + c < visible[r]) softmax.see(r, s * a.scale_log2, v.row(c));
    });
  }
  for (int r = 0; r < count; ++r) {
    const bool is_only_one = results[r] < 0;
    const int64_t result = is_only_one ? ~results[r] : results[r];
    auto *to = static_cast<uint16_t *>(is_only_one ? a.out : a.partial_out) + result * kHeadDim;
    const double sum = softmax.sum[r];
    for (int c = 0; c < kHeadDim; ++c)
      to[c] = rounded(kBfloat16, sum == 0 ? 0 : softmax.out.row(r)[c] / sum);
    if (!is_only_one)
      a.partial_lse[result] = sum == 0 ? -HUGE_VAL : softmax.max[r] + std::log2(sum);
  }
}

// Blocks take units in turn.
template <bool kBfloat16, int kHeadDim> void attend_units(const Launch &launch) {
  const auto &a = *static_cast<const AttendArguments *>(launch.arguments);
  require(launch.threads == kAttendThreads && launch.shared_bytes == sizeof(AttendShared<kHeadDim>),
          "threads or shared memory are not what the kernel takes");
  require(*a.next_unit == 0, "units are taken before the launch");
  std::vector<int> sequences(launch.blocks, 0); // units that each block has done
  for (int block = 0;; block = (block + 1) % launch.blocks) {
    const int index = (*a.next_unit)++;
    if (index >= a.num_items * a.kv_heads * a.row_tiles) break;
    const Place place = place_of(index, a.row_tiles, a.kv_heads);
    const DecodeItem item = a.items[place.item];
    if (item.end_row == item.first_row) break;
    const int rows = rows_of_unit(item, a.group, place.first_m);
    if (rows <= 0) continue;
    for (int warpgroup = 0; warpgroup < kRowWarpgroups; ++warpgroup) {
      const int first = first_row_of(rows, sequences[block], warpgroup);
      if (first >= 0)
        attend<kBfloat16, kHeadDim>(a, item, place.head, place.first_m + first,
                                    std::min(rows - first, kWarpgroupRows));
    }
    ++sequences[block];
  }
}

template <bool kBfloat16, int kHeadDim> void merge(const Launch &launch) {
  const auto &a = *static_cast<const MergeArguments *>(launch.arguments);
  for (int index = 0; index < launch.blocks * (launch.threads / 32); ++index) { // a warp each
    const int row = index / a.heads, head = index % a.heads;
    if (row >= a.num_rows || a.merge_ptr[row + 1] - a.merge_ptr[row] == 1) continue;
    double top = -1e30, total = 0;
    std::vector<double> sums(kHeadDim);
    const auto result = [&](int i) { return int64_t{a.merge_slots[i]} * a.heads + head; };
    for (int i = a.merge_ptr[row]; i < a.merge_ptr[row + 1]; ++i)
      top = std::fmax(top, a.partial_lse[result(i)]);
    for (int i = a.merge_ptr[row]; i < a.merge_ptr[row + 1]; ++i) {
      const double weight = std::exp2(a.partial_lse[result(i)] - top);
      total += weight;
      for (int c = 0; c < kHeadDim; ++c)
        sums[c] += weight * value(kBfloat16, static_cast<const uint16_t *>(
                                                 a.partial_out)[result(i) * kHeadDim + c]);
    }
    uint16_t *out = static_cast<uint16_t *>(a.out) +
                    (int64_t{a.rows[row]} * a.heads + head) * kHeadDim;
    for (int c = 0; c < kHeadDim; ++c)
      out[c] = rounded(kBfloat16, total == 0 ? 0 : sums[c] / total);
  }
}

template <bool kBfloat16, int kHeadDim> bool emulate(const Launch &launch) {
  const std::string types =
      (kBfloat16 ? "_bfloat16_" : "_float16_") + std::to_string(kHeadDim);
  if (launch.kernel == "trie_decode_merge" + types) merge<kBfloat16, kHeadDim>(launch);
  else if (launch.kernel == "trie_decode_attend" + types)
    attend_units<kBfloat16, kHeadDim>(launch);
  else return false;
  return true;
}

} // namespace

bool emulate_decode(const Launch &launch) {
  if (launch.kernel == "trie_decode_write") return write(launch), true;
  return emulate<true, 64>(launch) || emulate<true, 128>(launch) || emulate<false, 64>(launch) ||
         emulate<false, 128>(launch);
}

} // namespace tw::cuda
