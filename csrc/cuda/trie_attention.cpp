#include "trie_attention.h"

#include <algorithm>
#include <cmath>

namespace tw::cuda {

namespace {

// 227 KiB: what a thread block can have on Hopper.
constexpr unsigned kSharedLimit = 227 * 1024;

int64_t own_blocks(const TrieAttentionArgs &a) { return (a.tokens + kOwnRows - 1) / kOwnRows; }

int32_t group(const TrieAttentionArgs &a) { return static_cast<int32_t>(a.heads / a.kv_heads); }

float scale_log2(const TrieAttentionArgs &a) { return static_cast<float>(a.scale * M_LOG2E); }

template <template <int> class Shared>
Grid persistent_grid(const TrieAttentionArgs &a, int64_t tiles) {
  static_assert(sizeof(Shared<64>) <= kSharedLimit && sizeof(Shared<128>) <= kSharedLimit);
  const size_t shared = a.head_dim == 64 ? sizeof(Shared<64>) : sizeof(Shared<128>);
  return {static_cast<unsigned>(std::min(tiles, a.multiprocessors)), kThreads,
          static_cast<unsigned>(shared)};
}

} // namespace

Tiles tiles_of(const TrieAttentionArgs &a, const Heads &tensor, int64_t heads, int rows) {
  Tiles tiles{};
  tiles.element = Element::bfloat16;
  tiles.swizzle = Swizzle::bytes128;
  tiles.rank = 3;
  tiles.address = reinterpret_cast<uint64_t>(tensor.data);
  const int64_t sizes[] = {a.head_dim, heads, a.tokens};
  const int64_t strides[] = {1, tensor.head_stride, tensor.row_stride};
  const int box[] = {kBoxColumns, 1, rows};
  for (int i = 0; i < tiles.rank; ++i) {
    tiles.sizes[i] = static_cast<uint64_t>(sizes[i]);
    tiles.strides[i] = static_cast<uint64_t>(strides[i]) * sizeof(Bits);
    tiles.box[i] = static_cast<uint32_t>(box[i]);
  }
  return tiles;
}

ForwardArguments forward_arguments(const TrieAttentionArgs &a) {
  ForwardArguments f{};
  f.rows = a.rows, f.ends = a.ends, f.lse = a.lse;
  f.tokens = static_cast<int32_t>(a.tokens), f.heads = static_cast<int32_t>(a.heads);
  f.group = group(a), f.tiles = static_cast<int32_t>(own_blocks(a) * a.heads);
  f.scale_log2 = scale_log2(a);
  return f;
}

DeltaArguments delta_arguments(const TrieAttentionArgs &a) {
  DeltaArguments d{};
  d.dout = a.dout, d.out = a.out, d.lse = a.lse, d.lse2 = a.lse2, d.delta = a.delta;
  d.tokens = static_cast<int32_t>(a.tokens), d.padded = static_cast<int32_t>(padded(a.tokens));
  return d;
}

DqArguments dq_arguments(const TrieAttentionArgs &a) {
  DqArguments d{};
  d.rows = a.rows, d.ends = a.ends, d.lse2 = a.lse2, d.delta = a.delta;
  d.padded = static_cast<int32_t>(padded(a.tokens)), d.heads = static_cast<int32_t>(a.heads);
  d.group = group(a), d.tiles = static_cast<int32_t>(own_blocks(a) * a.heads);
  d.scale = a.scale, d.scale_log2 = scale_log2(a);
  return d;
}

DkvArguments dkv_arguments(const TrieAttentionArgs &a) {
  DkvArguments d{};
  d.columns = a.columns, d.ends = a.ends, d.lse2 = a.lse2, d.delta = a.delta;
  d.padded = static_cast<int32_t>(padded(a.tokens)), d.kv_heads = static_cast<int32_t>(a.kv_heads);
  d.group = group(a), d.tiles = static_cast<int32_t>(own_blocks(a) * a.kv_heads);
  d.scale = a.scale, d.scale_log2 = scale_log2(a);
  return d;
}

Grid forward_grid(const TrieAttentionArgs &a) {
  return persistent_grid<ForwardShared>(a, own_blocks(a) * a.heads);
}

Grid delta_grid(const TrieAttentionArgs &a) {
  const int64_t rows_of_block = kDeltaThreads / (a.head_dim / 8);
  return {static_cast<unsigned>(a.heads * (padded(a.tokens) / rows_of_block)), kDeltaThreads, 0};
}

Grid dq_grid(const TrieAttentionArgs &a) {
  return persistent_grid<DqShared>(a, own_blocks(a) * a.heads);
}

Grid dkv_grid(const TrieAttentionArgs &a) {
  return persistent_grid<DkvShared>(a, own_blocks(a) * a.kv_heads);
}

void trie_attention_forward(const TrieAttentionArgs &a, const OnDevice &device, void *stream,
                            const std::string &cubin) {
  const int stream_rows = forward_stream(static_cast<int>(a.head_dim)).rows;
  ForwardArguments f = forward_arguments(a);
  f.q = tensor_map(device, tiles_of(a, a.q, a.heads, kWarpgroupRows));
  f.out = tensor_map(device, tiles_of(a, a.out, a.heads, kWarpgroupRows));
  f.k = tensor_map(device, tiles_of(a, a.k, a.kv_heads, stream_rows));
  f.v = tensor_map(device, tiles_of(a, a.v, a.kv_heads, stream_rows));
  const std::string kernel = "trie_attention_forward_" + std::to_string(a.head_dim);
  launch(device, stream, cubin, kernel.c_str(), forward_grid(a), &f);
}

void trie_attention_backward(const TrieAttentionArgs &a, const OnDevice &device, void *stream,
                             const std::string &cubin) {
  const int head_dim = static_cast<int>(a.head_dim);
  const auto map = [&](const Heads &tensor, int64_t heads, int rows) {
    return tensor_map(device, tiles_of(a, tensor, heads, rows));
  };
  const auto start = [&](const char *kernel, const Grid &grid, const void *arguments) {
    const std::string name = "trie_attention_" + (kernel + ("_" + std::to_string(head_dim)));
    launch(device, stream, cubin, name.c_str(), grid, arguments);
  };
  const DeltaArguments delta = delta_arguments(a);
  start("delta", delta_grid(a), &delta);

  const int dq_rows = dq_stream(head_dim).rows;
  DqArguments dq = dq_arguments(a);
  dq.q = map(a.q, a.heads, kWarpgroupRows), dq.dout = map(a.dout, a.heads, kWarpgroupRows);
  dq.k = map(a.k, a.kv_heads, dq_rows), dq.v = map(a.v, a.kv_heads, dq_rows);
  dq.dq = map(a.dq, a.heads, kWarpgroupRows);
  start("dq", dq_grid(a), &dq);

  const int dkv_rows = dkv_stream(head_dim).rows;
  DkvArguments dkv = dkv_arguments(a);
  dkv.k = map(a.k, a.kv_heads, kWarpgroupRows), dkv.v = map(a.v, a.kv_heads, kWarpgroupRows);
  dkv.q = map(a.q, a.heads, dkv_rows), dkv.dout = map(a.dout, a.heads, dkv_rows);
  dkv.dk = map(a.dk, a.kv_heads, kWarpgroupRows), dkv.dv = map(a.dv, a.kv_heads, kWarpgroupRows);
  start("dkv", dkv_grid(a), &dkv);
}

} // namespace tw::cuda
