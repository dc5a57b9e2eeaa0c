#include <algorithm>
#include <cmath>

#include "cuda/attention/trie_attention.h"

namespace tw::cuda {

namespace {

constexpr size_t kSharedLimit = 227 * 1024; // bytes that a thread block can have on Hopper

// One call: its arguments, and how its kernels are started.
struct Call {
  const TrieAttentionArgs &a;
  const Launcher &launcher;

  int head_dim() const { return static_cast<int>(a.head_dim); }
  int32_t group() const { return static_cast<int32_t>(a.heads / a.kv_heads); }
  int32_t padded_tokens() const { return static_cast<int32_t>(padded(a.tokens)); }
  float scale_log2() const { return static_cast<float>(a.scale * M_LOG2E); }
  // Of kOwnRows rows or columns, of that many heads.
  int32_t tiles(int64_t heads) const {
    return static_cast<int32_t>((a.tokens + kOwnRows - 1) / kOwnRows * heads);
  }

  // Of a tensor in tiles of `rows` tokens of a head. Tokens beyond the last arrive as zeros and are
  // not stored.
  TensorMap map(const Heads &tensor, int64_t heads, int rows) const {
    return launcher.tensor_map({Element::bfloat16,
                                tensor.data,
                                {{a.head_dim, 1, kBoxColumns},
                                 {heads, tensor.head_stride, 1},
                                 {a.tokens, tensor.row_stride, rows}}});
  }

  void start(const char *kernel, const Grid &grid, const void *arguments) const {
    launcher.start("trie_attention_" + (kernel + ("_" + std::to_string(a.head_dim))), grid,
                   arguments);
  }

  template <template <int> class Shared, class Arguments>
  void start_persistent(const char *kernel, const Arguments &arguments) const {
    static_assert(sizeof(Shared<64>) <= kSharedLimit && sizeof(Shared<128>) <= kSharedLimit);
    const size_t shared = a.head_dim == 64 ? sizeof(Shared<64>) : sizeof(Shared<128>);
    start(kernel,
          {std::min<int64_t>(arguments.tiles, a.multiprocessors), kThreads,
           static_cast<int>(shared)},
          &arguments);
  }
};

} // namespace

void trie_attention_forward(const TrieAttentionArgs &a, const Launcher &launcher) {
  const Call call{a, launcher};
  const int rows = forward_stream(call.head_dim()).rows;
  ForwardArguments f{};
  f.q = call.map(a.q, a.heads, kWarpgroupRows), f.out = call.map(a.out, a.heads, kWarpgroupRows);
  f.k = call.map(a.k, a.kv_heads, rows), f.v = call.map(a.v, a.kv_heads, rows);
  f.rows = a.rows, f.ends = a.ends, f.lse = a.lse;
  f.tokens = static_cast<int32_t>(a.tokens), f.heads = static_cast<int32_t>(a.heads);
  f.group = call.group(), f.tiles = call.tiles(a.heads);
  f.scale_log2 = call.scale_log2();
  call.start_persistent<ForwardShared>("forward", f);
}

void trie_attention_backward(const TrieAttentionArgs &a, const Launcher &launcher) {
  const Call call{a, launcher};
  const int head_dim = call.head_dim();

  DeltaArguments delta{};
  delta.dout = a.dout, delta.out = a.out;
  delta.lse = a.lse, delta.lse2 = a.lse2, delta.delta = a.delta;
  delta.tokens = static_cast<int32_t>(a.tokens), delta.padded = call.padded_tokens();
  const int64_t delta_blocks = a.heads * (delta.padded / delta_rows(head_dim));
  call.start("delta", {delta_blocks, kDeltaThreads}, &delta);

  const int dq_rows = dq_stream(head_dim).rows;
  DqArguments dq{};
  dq.q = call.map(a.q, a.heads, kWarpgroupRows), dq.dout = call.map(a.dout, a.heads, kWarpgroupRows);
  dq.k = call.map(a.k, a.kv_heads, dq_rows), dq.v = call.map(a.v, a.kv_heads, dq_rows);
  dq.dq = call.map(a.dq, a.heads, kWarpgroupRows);
  dq.rows = a.rows, dq.ends = a.ends, dq.lse2 = a.lse2, dq.delta = a.delta;
  dq.padded = call.padded_tokens(), dq.heads = static_cast<int32_t>(a.heads);
  dq.group = call.group(), dq.tiles = call.tiles(a.heads);
  dq.scale = a.scale, dq.scale_log2 = call.scale_log2();
  call.start_persistent<DqShared>("dq", dq);

  const int dkv_rows = dkv_stream(head_dim).rows;
  DkvArguments dkv{};
  dkv.k = call.map(a.k, a.kv_heads, kWarpgroupRows);
  dkv.v = call.map(a.v, a.kv_heads, kWarpgroupRows);
  dkv.q = call.map(a.q, a.heads, dkv_rows), dkv.dout = call.map(a.dout, a.heads, dkv_rows);
  dkv.dk = call.map(a.dk, a.kv_heads, kWarpgroupRows);
  dkv.dv = call.map(a.dv, a.kv_heads, kWarpgroupRows);
  dkv.columns = a.columns, dkv.ends = a.ends, dkv.lse2 = a.lse2, dkv.delta = a.delta;
  dkv.padded = call.padded_tokens(), dkv.kv_heads = static_cast<int32_t>(a.kv_heads);
  dkv.group = call.group(), dkv.tiles = call.tiles(a.kv_heads);
  dkv.scale = a.scale, dkv.scale_log2 = call.scale_log2();
  call.start_persistent<DkvShared>("dkv", dkv);
}

} // namespace tw::cuda
