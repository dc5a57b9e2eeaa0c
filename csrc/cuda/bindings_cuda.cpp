#include "bindings_cuda.h"

#include <pybind11/stl.h>

#include <array>
#include <string>

#include "driver.h"
#include "trie_decode.h"

namespace py = pybind11;

namespace tw::cuda {

namespace {

using Strided = std::array<int64_t, 3>; // address, row stride, head stride
using Sizes = std::array<int64_t, 9>;   // rows, items, partial slots, tile rows, heads, KV heads,
                                        // head dim, pages, page size
using PlanArrays = std::array<int64_t, 7>; // addresses: rows, positions, slots, merge_ptr,
                                           // merge_slots, items, pages
using PageArrays = std::array<int64_t, 5>; // addresses of K and V, strides of pages, slots, heads
using Results = std::array<int64_t, 3>;    // addresses: out, partial outputs, partial lse
using Place = std::tuple<int, int64_t, std::string>; // device, stream, cubin

template <class T> T *pointer(int64_t address) { return reinterpret_cast<T *>(address); }

Rows strided(const Strided &x) { return {pointer<void>(x[0]), x[1], x[2]}; }

Element element(int dtype) { // Dtype of cpu/trie_attention.h
  return dtype == 0 ? Element::float32 : dtype == 1 ? Element::bfloat16 : Element::float16;
}

TrieDecodeArgs shapes(const Sizes &sizes, int dtype, const PageArrays &kv) {
  TrieDecodeArgs a{};
  a.rows = sizes[0], a.num_items = sizes[1], a.partial_slots = sizes[2], a.tile_rows = sizes[3];
  a.heads = sizes[4], a.kv_heads = sizes[5], a.head_dim = sizes[6];
  a.num_pages = sizes[7], a.page_size = sizes[8];
  a.element = element(dtype);
  a.kv = {pointer<void>(kv[0]), pointer<void>(kv[1]), kv[2], kv[3], kv[4]};
  return a;
}

void decode(const Sizes &sizes, int dtype, float scale, const Place &place, const PlanArrays &plan,
            const Strided &q, const PageArrays &kv, const Strided &new_k, const Strided &new_v,
            const Results &results) {
  TrieDecodeArgs a = shapes(sizes, dtype, kv);
  a.scale = scale;
  a.caller_rows = pointer<const int32_t>(plan[0]);
  a.positions = pointer<const int32_t>(plan[1]);
  a.slots = pointer<const int32_t>(plan[2]);
  a.merge_ptr = pointer<const int32_t>(plan[3]);
  a.merge_slots = pointer<const int32_t>(plan[4]);
  a.items = pointer<const DecodeItem>(plan[5]);
  a.pages = pointer<const int32_t>(plan[6]);
  a.q = strided(q), a.new_k = strided(new_k), a.new_v = strided(new_v);
  a.out = pointer<void>(results[0]);
  a.partial_out = pointer<float>(results[1]);
  a.partial_lse = pointer<float>(results[2]);
  const auto &[device, stream, cubin] = place;
  trie_decode(a, OnDevice(device), pointer<void>(stream), cubin);
}

} // namespace

void bind_cuda(py::module_ &m) {
  m.def("cuda_driver_missing", &why_no_driver);
  m.def("cuda_trie_decode_refusal", [](const Sizes &sizes, int dtype, const PageArrays &kv) {
    return why_not(shapes(sizes, dtype, kv));
  });
  m.def("cuda_trie_decode", &decode, py::call_guard<py::gil_scoped_release>());
}

} // namespace tw::cuda
