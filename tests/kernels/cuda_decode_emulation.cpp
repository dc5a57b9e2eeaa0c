// The decode kernels (csrc/cuda/decode) in double precision: the items, pages and addresses of a
// launch, in one order.
#include <algorithm>

#include "cuda/decode/index.h"
#include "cuda/decode/trie_decode.h"
#include "cuda_emulation.h"

namespace tw::cuda {

namespace {

void write(const Launch &launch) {
  const auto &a = *static_cast<const WriteArguments *>(launch.arguments);
  for (int block = 0; block < launch.blocks; ++block) {
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

// The keys or values [first_key, first_key + kTile) of an item, of which `keys` exist.
Matrix load_tile(const TensorMap &map, const PartialArguments &a, const DecodeItem &item, int head,
                 int first_key, int keys, bool bfloat16, int head_dim) {
  std::vector<uint16_t> tile(kTile * head_dim, 0xffff);
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
  return {bfloat16, tile.data(), kTile, head_dim};
}

template <bool kBfloat16, int kHeadDim, int kWarpgroups> void partial(const Launch &launch) {
  const auto &a = *static_cast<const PartialArguments *>(launch.arguments);
  require(launch.threads == partial_threads(kWarpgroups) &&
              launch.shared_bytes == partial_shared_bytes(kHeadDim, kWarpgroups),
          "threads or shared memory are not what the kernel takes");
  const int query_heads = a.kv_heads * a.group;
  for (int block = 0; block < launch.blocks; ++block) {
    const Part part = part_of_block(block, a.row_blocks, a.kv_heads, kWarpgroups);
    const DecodeItem item = a.items[part.item];
    const int all_m = (item.end_row - item.first_row) * a.group;
    for (int first_m = part.first_m; first_m < part.first_m + kWarpgroups * kTile; first_m += kTile) {
      const int end_m = std::min(all_m, first_m + kTile);
      if (first_m >= end_m) continue;
      std::vector<uint16_t> tile(kTile * kHeadDim);
      std::vector<int> visible(kTile);
      for (int m = first_m; m < end_m; ++m) {
        const int row = item.first_row + row_of(m, a.group);
        visible[m - first_m] = visible_keys(item, a.positions[row]);
        for (int chunk = 0; chunk < kHeadDim / kChunkColumns; ++chunk)
          std::memcpy(&tile[chunk_offset(m - first_m, chunk) / kElementBytes],
                      static_cast<const uint16_t *>(a.q.data) + a.rows[row] * a.q.row_stride +
                          head_of(m, a.group, part.head) * a.q.head_stride + chunk * kChunkColumns,
                      16);
      }
      const Matrix q(kBfloat16, tile.data(), kTile, kHeadDim);
      const int most = *std::max_element(visible.begin(), visible.end());
      SoftmaxRows softmax(kHeadDim);
      for (int first = 0; first < most; first += kTile) {
        const auto load = [&](const TensorMap &map) {
          return load_tile(map, a, item, part.head, first, most - first, kBfloat16, kHeadDim);
        };
        const Matrix k = load(a.k), v = load(a.v);
        for_each_product(q, k, [&](int r, int c, double s) {
          if (first + c < visible[r]) softmax.see(r, s * a.scale_log2, v.row(c));
        });
      }
      for (int m = first_m; m < end_m; ++m) {
        const int r = m - first_m;
        const int64_t result = (int64_t{item.first_slot} + row_of(m, a.group)) * query_heads +
                               head_of(m, a.group, part.head);
        const double sum = softmax.sum[r];
        for (int c = 0; c < kHeadDim; ++c)
          a.out[result * kHeadDim + c] = sum == 0 ? 0 : softmax.out.row(r)[c] / sum;
        a.lse[result] = sum == 0 ? -HUGE_VAL : softmax.max[r] + std::log2(sum);
      }
    }
  }
}

template <bool kBfloat16, int kHeadDim> void merge(const Launch &launch) {
  const auto &a = *static_cast<const MergeArguments *>(launch.arguments);
  for (int index = 0; index < launch.blocks * (launch.threads / 32); ++index) { // a warp each
    const int row = index / a.heads, head = index % a.heads;
    if (row >= a.num_rows) continue;
    double top = -1e30, total = 0;
    std::vector<double> sums(kHeadDim);
    const auto result = [&](int i) { return int64_t{a.merge_slots[i]} * a.heads + head; };
    for (int i = a.merge_ptr[row]; i < a.merge_ptr[row + 1]; ++i)
      top = std::fmax(top, a.partial_lse[result(i)]);
    for (int i = a.merge_ptr[row]; i < a.merge_ptr[row + 1]; ++i) {
      const double weight = std::exp2(a.partial_lse[result(i)] - top);
      total += weight;
      for (int c = 0; c < kHeadDim; ++c)
        sums[c] += weight * a.partial_out[result(i) * kHeadDim + c];
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
  else if (launch.kernel == "trie_decode_partial" + types + "_1")
    partial<kBfloat16, kHeadDim, 1>(launch);
  else if (launch.kernel == "trie_decode_partial" + types + "_2")
    partial<kBfloat16, kHeadDim, 2>(launch);
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
