#include "trie_decode.h"

#include <algorithm>
#include <cmath>

#include "trie_decode_index.h"

namespace tw::cuda {

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Of the largest item that the plan has room for.
int64_t matrix_rows(const TrieDecodeArgs &a) {
  return std::min(a.tile_rows, a.rows) * (a.heads / a.kv_heads);
}

int64_t row_blocks(const TrieDecodeArgs &a) {
  return ceil_div(matrix_rows(a), warpgroups(a) * kTile);
}

Grid grid(int64_t blocks, int threads, int shared_bytes = 0) {
  return {static_cast<unsigned>(blocks), static_cast<unsigned>(threads),
          static_cast<unsigned>(shared_bytes)};
}

} // namespace

int warpgroups(const TrieDecodeArgs &a) { return matrix_rows(a) > kTile ? kMaxWarpgroups : 1; }

std::string why_not(const TrieDecodeArgs &a) {
  if (a.element == Element::float32)
    return "the CUDA kernels take bfloat16 and float16, not float32";
  if (a.head_dim != 64 && a.head_dim != 128)
    return "the CUDA kernels take head dims 64 and 128, not " + std::to_string(a.head_dim);
  if (a.page_size != 16 && a.page_size != 32 && (a.page_size < kTile || a.page_size % kTile))
    return "the CUDA kernels take pages of 16, 32 or a multiple of 64 tokens, not " +
           std::to_string(a.page_size);
  for (const void *pages : {a.kv.k, a.kv.v}) {
    const std::string reason = why_not(page_tiles(a, pages));
    if (!reason.empty()) return "the copy engine does not take pages with " + reason;
  }
  return "";
}

Tiles page_tiles(const TrieDecodeArgs &a, const void *pages) {
  Tiles tiles{};
  tiles.element = a.element;
  tiles.swizzle = Swizzle::bytes128;
  tiles.rank = 4;
  tiles.address = reinterpret_cast<uint64_t>(pages);
  const int64_t sizes[] = {a.head_dim, a.kv_heads, a.page_size, a.num_pages};
  const int64_t strides[] = {1, a.kv.head_stride, a.kv.slot_stride, a.kv.page_stride};
  const int box[] = {kBoxColumns, 1, box_keys(static_cast<int>(a.page_size)), 1};
  for (int i = 0; i < tiles.rank; ++i) {
    tiles.sizes[i] = sizes[i];
    tiles.strides[i] = strides[i] * kElementBytes;
    tiles.box[i] = box[i];
  }
  return tiles;
}

WriteArguments write_arguments(const TrieDecodeArgs &a) {
  WriteArguments w{};
  w.new_k = a.new_k, w.new_v = a.new_v, w.kv = a.kv;
  w.rows = a.caller_rows, w.slots = a.slots;
  w.kv_heads = a.kv_heads, w.head_dim = a.head_dim, w.page_size = a.page_size;
  return w;
}

PartialArguments partial_arguments(const TrieDecodeArgs &a) {
  PartialArguments p{};
  p.q = a.q;
  p.out = a.partial_out, p.lse = a.partial_lse;
  p.rows = a.caller_rows, p.positions = a.positions, p.pages = a.pages, p.items = a.items;
  p.kv_heads = a.kv_heads, p.group = a.heads / a.kv_heads;
  p.page_size = a.page_size;
  p.row_blocks = row_blocks(a);
  p.scale_log2 = static_cast<float>(a.scale * M_LOG2E);
  return p;
}

MergeArguments merge_arguments(const TrieDecodeArgs &a) {
  MergeArguments m{};
  m.partial_out = a.partial_out, m.partial_lse = a.partial_lse, m.out = a.out;
  m.rows = a.caller_rows, m.merge_ptr = a.merge_ptr, m.merge_slots = a.merge_slots;
  m.num_rows = a.rows, m.heads = a.heads;
  return m;
}

Grid write_grid(const TrieDecodeArgs &a) { return grid(a.rows, kWriteThreads); }

Grid partial_grid(const TrieDecodeArgs &a) {
  return grid(a.num_items * a.kv_heads * row_blocks(a), partial_threads(warpgroups(a)),
              partial_shared_bytes(a.head_dim, warpgroups(a)));
}

Grid merge_grid(const TrieDecodeArgs &a) {
  return grid(ceil_div(a.rows * a.heads, kMergeThreads / 32), kMergeThreads);
}

void trie_decode(const TrieDecodeArgs &a, const OnDevice &device, void *stream,
                 const std::string &cubin) {
  if (a.rows == 0) return;
  const std::string types = (a.element == Element::bfloat16 ? "_bfloat16_" : "_float16_") +
                            std::to_string(a.head_dim);
  const std::string partial_name =
      "trie_decode_partial" + types + "_" + std::to_string(warpgroups(a));
  const std::string merge_name = "trie_decode_merge" + types;
  const auto start = [&](const std::string &kernel, const Grid &grid, const void *arguments) {
    launch(device, stream, cubin, kernel.c_str(), grid, arguments);
  };
  if (a.new_k.data) {
    const WriteArguments write = write_arguments(a);
    start("trie_decode_write", write_grid(a), &write);
  }
  PartialArguments partial = partial_arguments(a);
  partial.k = tensor_map(device, page_tiles(a, a.kv.k));
  partial.v = tensor_map(device, page_tiles(a, a.kv.v));
  start(partial_name, partial_grid(a), &partial);
  const MergeArguments merge = merge_arguments(a);
  start(merge_name, merge_grid(a), &merge);
}

} // namespace tw::cuda
