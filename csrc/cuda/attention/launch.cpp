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
  int32_t blocks_of(int64_t rows) const { return static_cast<int32_t>((a.tokens + rows - 1) / rows); }
  int32_t row_tiles() const {
    return blocks_of(row_block(a.row_grain)) *
           cuda::row_tiles(a.row_grain, static_cast<int>(a.kv_heads), group());
  }
  int32_t column_tiles() const { return blocks_of(kOwnRows) * static_cast<int32_t>(a.kv_heads); }

  // Of a tensor in tiles of `rows` tokens of a head. Tokens beyond the last arrive as zeros and are
  // not stored.
  TensorMap map(const Heads &tensor, int64_t heads, int rows) const {
    return launcher.tensor_map({a.element,
                                tensor.data,
                                {{a.head_dim, 1, kBoxColumns},
                                 {heads, tensor.head_stride, 1},
                                 {a.tokens, tensor.row_stride, rows}}});
  }

  void start(const std::string &kernel, const char *grain, const Grid &grid,
             const void *arguments) const {
    launcher.start("trie_attention_" + kernel +
                       (a.element == Element::bfloat16 ? "_bfloat16_" : "_float16_") +
                       std::to_string(a.head_dim) + grain,
                   grid, arguments);
  }

  template <template <int, Grain> class Shared, class Arguments>
  void start_persistent(const char *kernel, Grain grain, const Arguments &arguments) const {
    constexpr Grain kCoarse = Grain::coarse, kFine = Grain::fine;
    constexpr size_t kBytes[2][2] = {{sizeof(Shared<64, kCoarse>), sizeof(Shared<64, kFine>)},
                                     {sizeof(Shared<128, kCoarse>), sizeof(Shared<128, kFine>)}};
    static_assert(kBytes[0][0] <= kSharedLimit && kBytes[0][1] <= kSharedLimit &&
                  kBytes[1][0] <= kSharedLimit && kBytes[1][1] <= kSharedLimit);
    const bool fine = grain == kFine;
    start(kernel, fine ? "_fine" : "_coarse",
          {std::min<int64_t>(arguments.tiles, a.multiprocessors), kThreads,
           static_cast<int>(kBytes[a.head_dim == 128][fine])},
          &arguments);
  }
};

} // namespace

void trie_attention_forward(const TrieAttentionArgs &a, const Launcher &launcher) {
  const Call call{a, launcher};
  const int rows = forward_stream(call.head_dim(), a.row_grain).rows;
  ForwardArguments f{};
  f.q = call.map(a.q, a.heads, kWarpgroupRows), f.out = call.map(a.out, a.heads, kWarpgroupRows);
  f.k = call.map(a.k, a.kv_heads, rows), f.v = call.map(a.v, a.kv_heads, rows);
  f.rows = a.rows, f.ends = a.ends, f.lse = a.lse;
  f.tokens = static_cast<int32_t>(a.tokens), f.group = call.group();
  f.kv_heads = static_cast<int32_t>(a.kv_heads), f.tiles = call.row_tiles();
  f.scale_log2 = call.scale_log2();
  call.start_persistent<ForwardShared>("forward", a.row_grain, f);
}

void trie_attention_backward(const TrieAttentionArgs &a, const Launcher &launcher) {
  const Call call{a, launcher};
  const int head_dim = call.head_dim();

  DeltaArguments delta{};
  delta.dout = a.dout, delta.out = a.out;
  delta.lse = a.lse, delta.lse2 = a.lse2, delta.delta = a.delta;
  delta.tokens = static_cast<int32_t>(a.tokens), delta.padded = call.padded_tokens();
  const int64_t delta_blocks = a.heads * (delta.padded / delta_rows(head_dim));
  call.start("delta", "", {delta_blocks, kDeltaThreads}, &delta);

  const int dq_rows = dq_stream(head_dim, a.row_grain).rows;
  DqArguments dq{};
  dq.q = call.map(a.q, a.heads, kWarpgroupRows), dq.dout = call.map(a.dout, a.heads, kWarpgroupRows);
  dq.k = call.map(a.k, a.kv_heads, dq_rows), dq.v = call.map(a.v, a.kv_heads, dq_rows);
  dq.dq = call.map(a.dq, a.heads, kWarpgroupRows);
  dq.rows = a.rows, dq.ends = a.ends, dq.lse2 = a.lse2, dq.delta = a.delta;
  dq.padded = call.padded_tokens(), dq.group = call.group();
  dq.kv_heads = static_cast<int32_t>(a.kv_heads), dq.tiles = call.row_tiles();
  dq.scale = a.scale, dq.scale_log2 = call.scale_log2();
  call.start_persistent<DqShared>("dq", a.row_grain, dq);

  const int dkv_rows = dkv_stream(head_dim).rows;
  DkvArguments dkv{};
  dkv.k = call.map(a.k, a.kv_heads, kWarpgroupRows);
  dkv.v = call.map(a.v, a.kv_heads, kWarpgroupRows);
  dkv.q = call.map(a.q, a.heads, dkv_rows), dkv.dout = call.map(a.dout, a.heads, dkv_rows);
  dkv.dk = call.map(a.dk, a.kv_heads, kWarpgroupRows);
  dkv.dv = call.map(a.dv, a.kv_heads, kWarpgroupRows);
  dkv.columns = a.columns, dkv.ends = a.ends, dkv.lse2 = a.lse2, dkv.delta = a.delta;
  dkv.padded = call.padded_tokens(), dkv.kv_heads = static_cast<int32_t>(a.kv_heads);
  dkv.group = call.group(), dkv.tiles = call.column_tiles();
  dkv.scale = a.scale, dkv.scale_log2 = call.scale_log2();
  call.start_persistent<DkvShared>("dkv", a.column_grain, dkv);
}

} // namespace tw::cuda
