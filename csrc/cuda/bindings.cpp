// The CUDA kernels as Python calls them: tensors as addresses and strides (tw_kernels/native.py).
#include "cuda/bindings.h"

#include <pybind11/stl.h>

#include <array>
#include <string>
#include <tuple>

#include "cuda/attention/trie_attention.h"
#include "cuda/decode/trie_decode.h"

namespace py = pybind11;

namespace tw::cuda {

namespace {

using Strided = std::array<int64_t, 3>;              // address, row stride, head stride
using Place = std::tuple<int, int64_t, std::string>; // device, stream, cubin

template <class T> T *pointer(int64_t address) { return reinterpret_cast<T *>(address); }

Heads heads(const Strided &x) { return {pointer<void>(x[0]), x[1], x[2]}; }

// What starts kernels there; holds the device's context.
Launcher launcher(const Place &place) {
  const auto &[device, stream, cubin] = place;
  return Launcher(device, pointer<void>(stream), cubin);
}

Element element(int dtype) { // Dtype of cpu/trie_attention.h
  return dtype == 0 ? Element::float32 : dtype == 1 ? Element::bfloat16 : Element::float16;
}

// ---- trie_attention

using AttentionSizes = std::array<int64_t, 6>; // tokens, heads, KV heads, head dim, dtype,
                                               // multiprocessors
using RowArrays = std::array<int64_t, 5>;      // is fine; addresses of RowSchedule's fields
using ColumnArrays = std::array<int64_t, 3>;   // is fine; addresses of ColumnSchedule's fields
using Stats = std::array<int64_t, 3>;          // addresses of lse, lse2 and delta

TrieAttentionArgs attention_args(const AttentionSizes &sizes, float scale, int64_t ends,
                                 const RowArrays &rows, const std::array<Strided, 4> &tensors,
                                 int64_t lse) {
  TrieAttentionArgs a{};
  a.tokens = sizes[0], a.heads = sizes[1], a.kv_heads = sizes[2], a.head_dim = sizes[3];
  a.element = element(static_cast<int>(sizes[4])), a.multiprocessors = sizes[5];
  a.scale = scale;
  a.ends = pointer<const int32_t>(ends);
  a.row_grain = rows[0] ? Grain::fine : Grain::coarse;
  a.rows = {pointer<const int32_t>(rows[1]), pointer<const int32_t>(rows[2]),
            pointer<const int32_t>(rows[3]), pointer<const int32_t>(rows[4])};
  a.q = heads(tensors[0]), a.k = heads(tensors[1]), a.v = heads(tensors[2]);
  a.out = heads(tensors[3]);
  a.lse = pointer<float>(lse);
  return a;
}

// tensors: q, k, v, out.
void attention_forward(const AttentionSizes &sizes, float scale, const Place &place, int64_t ends,
                       const RowArrays &rows, const std::array<Strided, 4> &tensors, int64_t lse) {
  trie_attention_forward(attention_args(sizes, scale, ends, rows, tensors, lse), launcher(place));
}

// gradients: of out, q, k, v.
void attention_backward(const AttentionSizes &sizes, float scale, const Place &place, int64_t ends,
                        const RowArrays &rows, const ColumnArrays &columns,
                        const std::array<Strided, 4> &tensors,
                        const std::array<Strided, 4> &gradients, const Stats &stats) {
  TrieAttentionArgs a = attention_args(sizes, scale, ends, rows, tensors, stats[0]);
  a.column_grain = columns[0] ? Grain::fine : Grain::coarse;
  a.columns = {pointer<const int32_t>(columns[1]), pointer<const int32_t>(columns[2])};
  a.dout = heads(gradients[0]), a.dq = heads(gradients[1]);
  a.dk = heads(gradients[2]), a.dv = heads(gradients[3]);
  a.lse2 = pointer<float>(stats[1]), a.delta = pointer<float>(stats[2]);
  trie_attention_backward(a, launcher(place));
}

// ---- trie_decode

using DecodeSizes = std::array<int64_t, 9>; // rows, items, tile rows, multiprocessors, heads,
                                            // KV heads, head dim, pages, page size
using PlanArrays = std::array<int64_t, 7>;  // addresses: rows, positions, slots, merge_ptr,
                                            // merge_slots, items, pages
using PageArrays = std::array<int64_t, 5>;  // addresses of K and V, strides of pages, slots, heads
using Results = std::array<int64_t, 4>;     // addresses: out, partial outputs, partial lse, counter

TrieDecodeArgs decode_args(const DecodeSizes &sizes, int dtype, const PageArrays &kv) {
  TrieDecodeArgs a{};
  a.rows = sizes[0], a.num_items = sizes[1], a.tile_rows = sizes[2], a.multiprocessors = sizes[3];
  a.heads = sizes[4], a.kv_heads = sizes[5], a.head_dim = sizes[6];
  a.num_pages = sizes[7], a.page_size = sizes[8];
  a.element = element(dtype);
  a.kv = {pointer<void>(kv[0]), pointer<void>(kv[1]), kv[2], kv[3], kv[4]};
  return a;
}

void decode(const DecodeSizes &sizes, int dtype, float scale, const Place &place,
            const PlanArrays &plan, const Strided &q, const PageArrays &kv, const Strided &new_k,
            const Strided &new_v, const Results &results) {
  TrieDecodeArgs a = decode_args(sizes, dtype, kv);
  a.scale = scale;
  a.caller_rows = pointer<const int32_t>(plan[0]);
  a.positions = pointer<const int32_t>(plan[1]);
  a.slots = pointer<const int32_t>(plan[2]);
  a.merge_ptr = pointer<const int32_t>(plan[3]);
  a.merge_slots = pointer<const int32_t>(plan[4]);
  a.items = pointer<const DecodeItem>(plan[5]);
  a.pages = pointer<const int32_t>(plan[6]);
  a.q = heads(q), a.new_k = heads(new_k), a.new_v = heads(new_v);
  a.out = pointer<void>(results[0]);
  a.partial_out = pointer<void>(results[1]);
  a.partial_lse = pointer<float>(results[2]);
  a.next_unit = pointer<int32_t>(results[3]);
  trie_decode(a, launcher(place));
}

} // namespace

void bind_cuda(py::module_ &m) {
  m.def("cuda_driver_missing", &why_no_driver);
  m.def("cuda_trie_attention_forward", &attention_forward,
        py::call_guard<py::gil_scoped_release>());
  m.def("cuda_trie_attention_backward", &attention_backward,
        py::call_guard<py::gil_scoped_release>());
  m.def("cuda_trie_decode_refusal",
        [](const DecodeSizes &sizes, int dtype, const PageArrays &kv) {
          return why_not(decode_args(sizes, dtype, kv));
        });
  m.def("cuda_trie_decode", &decode, py::call_guard<py::gil_scoped_release>());
}

} // namespace tw::cuda
