#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "cuda/decode/index.h"
#include "cuda/decode/shared.h"
#include "cuda/decode/trie_decode.h"

namespace tw::cuda {

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// K or V, in boxes of the keys of a page in a tile.
Tiles page_tiles(const TrieDecodeArgs &a, const void *pages) {
  return {a.element,
          pages,
          {{a.head_dim, 1, kBoxColumns},
           {a.kv_heads, a.kv.head_stride, 1},
           {a.page_size, a.kv.slot_stride, box_keys(static_cast<int>(a.page_size))},
           {a.num_pages, a.kv.page_stride, 1}}};
}

} // namespace

std::string why_not(const TrieDecodeArgs &a) {
  if (a.element == Element::float32)
    return "the CUDA kernels take bfloat16 and float16, not float32";
  if (a.head_dim != 64 && a.head_dim != 128)
    return "the CUDA kernels take head dims 64 and 128, not " + std::to_string(a.head_dim);
  if (a.page_size != 16 && a.page_size != 32 && (a.page_size < 64 || a.page_size % 64))
    return "the CUDA kernels take pages of 16, 32 or a multiple of 64 tokens, not " +
           std::to_string(a.page_size);
  for (const void *pages : {a.kv.k, a.kv.v}) {
    const std::string reason = why_not(page_tiles(a, pages));
    if (!reason.empty()) return "the copy engine does not take pages with " + reason;
  }
  return "";
}

void trie_decode(const TrieDecodeArgs &a, const Launcher &launcher) {
  if (a.rows == 0) return;
  const int head_dim = static_cast<int>(a.head_dim);
  const std::string types =
      (a.element == Element::bfloat16 ? "_bfloat16_" : "_float16_") + std::to_string(head_dim);

  const int64_t row_tiles = // of the largest item that the plan has room for
      ceil_div(std::min(a.tile_rows, a.rows) * (a.heads / a.kv_heads), kUnitRows);
  const int64_t units = a.num_items * a.kv_heads * row_tiles;
  if (units > std::numeric_limits<int32_t>::max())
    throw std::invalid_argument("the CUDA kernels take fewer than 2^31 units of work, not " +
                                std::to_string(units) + ": plan fewer rows at a time");

  WriteArguments w{};
  w.new_k = a.new_k, w.new_v = a.new_v, w.kv = a.kv;
  w.rows = a.caller_rows, w.slots = a.slots;
  w.next_unit = a.next_unit;
  w.num_rows = a.new_k.data ? a.rows : 0;
  w.kv_heads = a.kv_heads, w.head_dim = a.head_dim, w.page_size = a.page_size;
  launcher.start("trie_decode_write", {std::max<int64_t>(1, w.num_rows), kWriteThreads}, &w);

  AttendArguments p{};
  p.k = launcher.tensor_map(page_tiles(a, a.kv.k));
  p.v = launcher.tensor_map(page_tiles(a, a.kv.v));
  p.q = a.q;
  p.out = a.out, p.partial_out = a.partial_out, p.partial_lse = a.partial_lse;
  p.next_unit = a.next_unit;
  p.rows = a.caller_rows, p.positions = a.positions, p.merge_ptr = a.merge_ptr, p.pages = a.pages;
  p.items = a.items;
  p.num_items = a.num_items;
  p.kv_heads = a.kv_heads, p.group = a.heads / a.kv_heads;
  p.page_size = a.page_size;
  p.row_tiles = row_tiles;
  p.scale_log2 = static_cast<float>(a.scale * M_LOG2E);
  const int shared_bytes =
      head_dim == 128 ? sizeof(AttendShared<128>) : sizeof(AttendShared<64>);
  launcher.start("trie_decode_attend" + types,
                 {std::min(a.multiprocessors, units), kAttendThreads, shared_bytes, true}, &p);

  MergeArguments m{};
  m.partial_out = a.partial_out, m.partial_lse = a.partial_lse, m.out = a.out;
  m.rows = a.caller_rows, m.merge_ptr = a.merge_ptr, m.merge_slots = a.merge_slots;
  m.num_rows = a.rows, m.heads = a.heads;
  launcher.start("trie_decode_merge" + types,
                 {ceil_div(a.rows * a.heads, kMergeThreads / 32), kMergeThreads, 0, true}, &m);
}

} // namespace tw::cuda
