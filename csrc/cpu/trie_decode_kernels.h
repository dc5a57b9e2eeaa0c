// The kernels of trie_decode.h, once for each instruction set; see simd.h for what to define.
#pragma once

#include "trie_decode_few.h"
#include "trie_decode_many.h"

namespace tw::TW_ISA {

namespace {

void attend_pairs(const ItemTask &task) {
  if constexpr (kMultipliesPairs) ManyRows<Pair>(task).attend();
}

void attend(const void *job, int64_t index, int worker) {
  ItemTask task(job, index, worker);
  const bool in_pairs = kMultipliesPairs && task.args.dtype == Dtype::bfloat16;
  const int64_t few = in_pairs ? min(kFewRows, kFewPairRows / task.head_dim) : kFewRows;
  task.begin();
  // The first keys of what this worker is likely to take next: fetched only as it begins, they would
  // cost a short task as much as its arithmetic.
  const int64_t next = index + task.job.threads;
  if (next < task.args.num_items * task.args.kv_heads)
    ItemTask(job, next, worker).prefetch_first();
  if (task.start < task.item.num_keys) { // else no row sees anything of it
    if (task.rows <= few)
      FewRows(task).attend();
    else if (in_pairs)
      attend_pairs(task);
    else
      ManyRows<float>(task).attend();
  }
  task.finish();
}

// The new key and value of a row to their slot.
void write(const void *context, int64_t row, int) {
  const TrieDecodeArgs &args = static_cast<const TrieDecodeJob *>(context)->args;
  const int64_t slot = args.slots[row], size = size_of(args.dtype);
  if (slot < 0) return; // padding
  const int64_t to = slot / args.page_size * args.kv.page_stride +
                     slot % args.page_size * args.kv.slot_stride;
  const auto copy = [&](void *pages, const Heads &x) {
    for (int64_t head = 0; head < args.kv_heads; ++head)
      memcpy(static_cast<char *>(pages) + (to + head * args.kv.head_stride) * size,
             static_cast<const char *>(x.data) +
                 (args.caller_rows[row] * x.row_stride + head * x.head_stride) * size,
             args.head_dim * size);
  };
  copy(args.kv.k, args.new_k);
  copy(args.kv.v, args.new_v);
}

void merge(const void *context, int64_t row, int worker) {
  const auto &job = *static_cast<const TrieDecodeJob *>(context);
  const TrieDecodeArgs &args = job.args;
  const int64_t group = args.heads / args.kv_heads, width = padded(args.head_dim);
  float *acc = reinterpret_cast<float *>(job.workspaces + worker * job.workspace_bytes);
  const int32_t *begin = args.merge_slots + args.merge_ptr[row];
  const int32_t *end = args.merge_slots + args.merge_ptr[row + 1];
  for (int64_t head = 0; head < args.heads; ++head) {
    const auto result = [&](int32_t slot) {
      return (head / group * args.partial_slots + slot) * group + head % group;
    };
    const float sink = args.sinks ? args.sinks[head] * kLog2E : -1e30f;
    float top = sink > -1e30f ? sink : -1e30f;
    for (const int32_t *slot = begin; slot < end; ++slot) {
      const float x = job.partial_top[result(*slot)];
      top = x > top ? x : top;
    }
    memset(acc, 0, width * 4);
    float sum = args.sinks ? exp2(all(sink - top))[0] : 0;
    for (const int32_t *slot = begin; slot < end; ++slot) {
      const int64_t r = result(*slot);
      const float weight = exp2(all(job.partial_top[r] - top))[0];
      sum += weight * job.partial_sum[r];
      for (int64_t d = 0; d < width; d += kLanes)
        store(acc + d, load(acc + d) + load(job.partial_out + r * width + d) * weight);
    }
    const int64_t at = args.caller_rows[row] * args.out.row_stride + head * args.out.head_stride;
    store_row(static_cast<char *>(args.out.data) + at * size_of(args.dtype), acc, args.dtype,
              args.head_dim, begin == end ? 0.0f : 1 / sum);
  }
}

} // namespace

const TrieDecodeKernels trie_decode = {padded, workspace_bytes, write, attend, merge};

} // namespace tw::TW_ISA
