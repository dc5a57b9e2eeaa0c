// Trie attention on a Hopper GPU: what the host and the kernels tell each other. Plain C++: both
// compile it.
//
//   trie_attention_fwd.cu   out and lse
//   trie_attention_bwd.cu   delta; dQ; dK with dV
//   device.h                what these share: tiles of a head, the mask, a thread block
//   index.h                 sizes and index arithmetic
//   launch.cpp              the host's half
//
// A thread block owns 64 rows (or columns) a warpgroup (Grain says which), and tiles of the other
// side stream past them through a ring in shared memory: one warp copies, two warpgroups compute.
// The grid is persistent: as many blocks as multiprocessors share out the tiles, longest first.
#pragma once

#include <cstdint>

#include "cuda/attention/index.h"
#include "cuda/driver.h"

namespace tw::cuda {

struct TrieAttentionArgs {
  Element element; // of the tensors: bfloat16 or float16
  int64_t tokens, heads, kv_heads, head_dim; // heads is a multiple of kv_heads; head_dim 64 or 128
  int64_t multiprocessors;
  float scale; // above 0
  const int32_t *ends; // [padded(tokens)]: subtree_ends, then 0
  Heads q, k, v, out;
  float *lse; // [heads, tokens], natural logarithm
  Grain row_grain;
  RowSchedule rows; // of blocks (row_block, forward_stream) or (row_block, dq_stream)
  // Backward only.
  Grain column_grain;
  ColumnSchedule columns; // of blocks (dkv_stream, 128)
  Heads dout, dq, dk, dv;
  float *lse2, *delta; // scratch, [heads, padded(tokens)]
};

// Rows, heads and strides of every tensor lie on 16 bytes. Both throw what the driver refuses.
void trie_attention_forward(const TrieAttentionArgs &args, const Launcher &launcher);
// Three launches: delta, dQ, dK with dV.
void trie_attention_backward(const TrieAttentionArgs &args, const Launcher &launcher);

// ---- The parameter of each kernel. Tensor maps: of (head_dim, heads, tokens) in boxes of 64
// elements of one head of a tile's tokens.

struct ForwardArguments {
  TensorMap q, k, v, out;
  RowSchedule rows;
  const int32_t *ends;
  float *lse;
  int32_t tokens, kv_heads, group; // group: query heads that share a KV head
  int32_t tiles;
  float scale_log2; // scale * log2(e): scores are in base 2
};

struct DeltaArguments {
  Heads dout, out;
  const float *lse;
  float *lse2, *delta; // lse * log2(e), rowsum(dout * out); 0 beyond the last token
  int32_t tokens, padded;
};

struct DqArguments {
  TensorMap q, k, v, dout, dq;
  RowSchedule rows;
  const int32_t *ends;
  const float *lse2, *delta;
  int32_t padded, kv_heads, group;
  int32_t tiles;
  float scale, scale_log2;
};

struct DkvArguments {
  TensorMap q, k, v, dout, dk, dv;
  ColumnSchedule columns;
  const int32_t *ends;
  const float *lse2, *delta;
  int32_t padded, kv_heads, group;
  int32_t tiles;
  float scale, scale_log2;
};

// ---- Shared memory of a thread block. Tiles start at multiples of 1024 bytes (box_offset).

using Bits = uint16_t; // of an element

template <int D, Grain kGrain> struct alignas(1024) ForwardShared {
  static constexpr Stream kStream = forward_stream(D, kGrain);
  Bits q[kConsumers][kWarpgroupRows * D];
  Bits out[kConsumers][kWarpgroupRows * D];
  Bits k[kStream.stages][kStream.rows * D];
  Bits v[kStream.stages][kStream.rows * D];
  alignas(128) int32_t ends[kStream.stages][kStream.rows]; // come with k
  uint64_t q_full[kConsumers], q_empty[kConsumers];
  uint64_t k_full[kStream.stages], k_empty[kStream.stages];
  uint64_t v_full[kStream.stages], v_empty[kStream.stages];
};

template <int D, Grain kGrain> struct alignas(1024) DqShared {
  static constexpr Stream kStream = dq_stream(D, kGrain);
  Bits q[kConsumers][kWarpgroupRows * D];
  Bits dout[kConsumers][kWarpgroupRows * D];
  Bits dq[kConsumers][kWarpgroupRows * D];
  Bits k[kStream.stages][kStream.rows * D];
  Bits v[kStream.stages][kStream.rows * D];
  alignas(128) int32_t ends[kStream.stages][kStream.rows];
  uint64_t own_full[kConsumers], own_empty[kConsumers]; // q and dout
  uint64_t full[kStream.stages], empty[kStream.stages]; // k, v and ends
};

template <int D, Grain> struct alignas(1024) DkvShared {
  static constexpr Stream kStream = dkv_stream(D);
  Bits k[kConsumers][kWarpgroupRows * D];
  Bits v[kConsumers][kWarpgroupRows * D];
  Bits dk[kConsumers][kWarpgroupRows * D];
  Bits dv[kConsumers][kWarpgroupRows * D];
  Bits q[kStream.stages][kStream.rows * D];
  Bits dout[kStream.stages][kStream.rows * D];
  alignas(128) float lse2[kStream.stages][kStream.rows];
  alignas(128) float delta[kStream.stages][kStream.rows];
  uint64_t own_full[kConsumers], own_empty[kConsumers]; // k and v
  uint64_t full[kStream.stages], empty[kStream.stages]; // q, dout, lse2 and delta
};

} // namespace tw::cuda
