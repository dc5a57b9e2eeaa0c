#include "bindings_cpu.h"

#include <pybind11/stl.h>

#include <array>
#include <string>
#include <vector>

#include "isa.h"
#include "linear.h"
#include "sampling.h"
#include "trie_attention.h"
#include "trie_decode.h"

namespace py = pybind11;

namespace tw {

namespace {

using Strided = std::array<int64_t, 3>; // address, row stride, head stride
using Sizes = std::array<int64_t, 4>;   // tokens, heads, KV heads, head dim

template <class T> T *pointer(int64_t address) { return reinterpret_cast<T *>(address); }

Heads strided(const Strided &x) { return {pointer<void>(x[0]), x[1], x[2]}; }

Heads contiguous(int64_t address, int64_t heads, int64_t head_dim) {
  return {pointer<void>(address), heads * head_dim, head_dim};
}

using Trie = std::array<int64_t, 2>; // addresses: subtree_ends, window_starts

TrieAttentionArgs arguments(const Sizes &sizes, int dtype, float scale, float softcap,
                            const Trie &trie, const Strided &q, const Strided &k, const Strided &v,
                            int64_t out, int64_t lse) {
  TrieAttentionArgs a{};
  a.tokens = sizes[0], a.heads = sizes[1], a.kv_heads = sizes[2], a.head_dim = sizes[3];
  a.dtype = static_cast<Dtype>(dtype);
  a.scale = scale, a.softcap = softcap;
  a.subtree_ends = pointer<const int32_t>(trie[0]);
  a.window_starts = pointer<const int32_t>(trie[1]);
  a.q = strided(q), a.k = strided(k), a.v = strided(v);
  a.out = contiguous(out, a.heads, a.head_dim);
  a.lse = pointer<float>(lse);
  return a;
}

void forward(const Sizes &sizes, int dtype, float scale, float softcap, int threads,
             const Trie &trie, const Strided &q, const Strided &k, const Strided &v, int64_t out,
             int64_t lse) {
  trie_attention_forward(arguments(sizes, dtype, scale, softcap, trie, q, k, v, out, lse), threads);
}

void backward(const Sizes &sizes, int dtype, float scale, float softcap, int threads,
              const Trie &trie, const Strided &q, const Strided &k, const Strided &v, int64_t out,
              int64_t lse, const Strided &dout, int64_t dq, int64_t dk, int64_t dv) {
  TrieAttentionArgs a = arguments(sizes, dtype, scale, softcap, trie, q, k, v, out, lse);
  a.dout = strided(dout);
  a.dq = contiguous(dq, a.heads, a.head_dim);
  a.dk = contiguous(dk, a.kv_heads, a.head_dim);
  a.dv = contiguous(dv, a.kv_heads, a.head_dim);
  trie_attention_backward(a, threads);
}

using DecodeSizes = std::array<int64_t, 7>; // rows, items, partial slots, heads, KV heads, head
                                            // dim, page size
using PlanArrays = std::array<int64_t, 7>;  // addresses: rows, positions, slots, merge_ptr,
                                            // merge_slots, items, pages
using Pages = std::array<int64_t, 5>; // addresses of K and V, strides of pages, slots and heads

void decode(const DecodeSizes &sizes, int dtype, float scale, int64_t window, float softcap,
            int64_t sinks, int threads, const PlanArrays &plan, const Strided &q, int64_t out,
            const Pages &kv, const Strided &new_k, const Strided &new_v) {
  TrieDecodeArgs a{};
  a.rows = sizes[0], a.num_items = sizes[1], a.partial_slots = sizes[2];
  a.heads = sizes[3], a.kv_heads = sizes[4], a.head_dim = sizes[5], a.page_size = sizes[6];
  a.dtype = static_cast<Dtype>(dtype);
  a.scale = scale, a.window = window, a.softcap = softcap;
  a.sinks = pointer<const float>(sinks);
  a.caller_rows = pointer<const int32_t>(plan[0]);
  a.positions = pointer<const int32_t>(plan[1]);
  a.slots = pointer<const int32_t>(plan[2]);
  a.merge_ptr = pointer<const int32_t>(plan[3]);
  a.merge_slots = pointer<const int32_t>(plan[4]);
  a.items = pointer<const DecodeItem>(plan[5]);
  a.pages = pointer<const int32_t>(plan[6]);
  a.q = strided(q), a.new_k = strided(new_k), a.new_v = strided(new_v);
  a.out = contiguous(out, a.heads, a.head_dim);
  a.kv = {pointer<void>(kv[0]), pointer<void>(kv[1]), kv[2], kv[3], kv[4]};
  trie_decode(a, threads);
}

void linear(int64_t rows, int64_t inputs, int64_t outputs, int threads, int64_t x,
            int64_t weight, int64_t bias, int64_t y) {
  few_row_linear({rows, inputs, outputs, pointer<const float>(x), pointer<const float>(weight),
                  pointer<const float>(bias), pointer<float>(y)},
                 threads);
}

void truncate(int64_t rows, int64_t vocabulary, int threads, int64_t logits, int64_t top_k,
              double top_p, int64_t min_weight) {
  truncate_logits({rows, vocabulary, pointer<float>(logits)}, {top_k, top_p, min_weight}, threads);
}

void draw(int64_t rows, int64_t vocabulary, int threads, int64_t logits, int64_t points,
          int64_t tokens) {
  draw_tokens({rows, vocabulary, pointer<float>(logits)}, pointer<const double>(points),
              pointer<int64_t>(tokens), threads);
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Isa isa : kBestFirst)
    if (is_supported(isa)) names.push_back(name(isa));
  return names;
}

} // namespace

void bind_cpu(py::module_ &m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("trie_attention_forward", &forward, release());
  m.def("trie_attention_backward", &backward, release());
  m.def("trie_decode", &decode, release());
  m.def("few_row_linear", &linear, release());
  m.def("truncate_logits", &truncate, release());
  m.def("draw_tokens", &draw, release());
  m.def("cpu_instruction_sets", &instruction_sets);
}

} // namespace tw
