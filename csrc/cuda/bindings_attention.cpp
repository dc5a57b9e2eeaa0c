#include "bindings_attention.h"

#include <pybind11/stl.h>

#include <array>
#include <string>
#include <tuple>

#include "trie_attention.h"

namespace py = pybind11;

namespace tw::cuda {

namespace {

using Sizes = std::array<int64_t, 5>; // tokens, heads, KV heads, head dim, multiprocessors
using Place = std::tuple<int, int64_t, std::string>; // device, stream, cubin
using RowArrays = std::array<int64_t, 4>;    // addresses of RowSchedule's fields
using ColumnArrays = std::array<int64_t, 2>; // addresses of ColumnSchedule's fields
using Strided = std::array<int64_t, 3>;      // address, row stride, head stride
using Stats = std::array<int64_t, 3>;        // addresses of lse, lse2 and delta

template <class T> T *pointer(int64_t address) { return reinterpret_cast<T *>(address); }

Heads heads(const Strided &x) { return {pointer<void>(x[0]), x[1], x[2]}; }

TrieAttentionArgs shared(const Sizes &sizes, float scale, int64_t ends, const RowArrays &rows,
                         const std::array<Strided, 4> &tensors, int64_t lse) {
  TrieAttentionArgs a{};
  a.tokens = sizes[0], a.heads = sizes[1], a.kv_heads = sizes[2], a.head_dim = sizes[3];
  a.multiprocessors = sizes[4];
  a.scale = scale;
  a.ends = pointer<const int32_t>(ends);
  a.rows = {pointer<const int32_t>(rows[0]), pointer<const int32_t>(rows[1]),
            pointer<const int32_t>(rows[2]), pointer<const int32_t>(rows[3])};
  a.q = heads(tensors[0]), a.k = heads(tensors[1]), a.v = heads(tensors[2]);
  a.out = heads(tensors[3]);
  a.lse = pointer<float>(lse);
  return a;
}

// tensors: q, k, v, out.
void forward(const Sizes &sizes, float scale, const Place &place, int64_t ends,
             const RowArrays &rows, const std::array<Strided, 4> &tensors, int64_t lse) {
  const auto &[device, stream, cubin] = place;
  trie_attention_forward(shared(sizes, scale, ends, rows, tensors, lse), OnDevice(device),
                         pointer<void>(stream), cubin);
}

// gradients: of out, q, k, v.
void backward(const Sizes &sizes, float scale, const Place &place, int64_t ends,
              const RowArrays &rows, const ColumnArrays &columns,
              const std::array<Strided, 4> &tensors, const std::array<Strided, 4> &gradients,
              const Stats &stats) {
  TrieAttentionArgs a = shared(sizes, scale, ends, rows, tensors, stats[0]);
  a.columns = {pointer<const int32_t>(columns[0]), pointer<const int32_t>(columns[1])};
  a.dout = heads(gradients[0]), a.dq = heads(gradients[1]);
  a.dk = heads(gradients[2]), a.dv = heads(gradients[3]);
  a.lse2 = pointer<float>(stats[1]), a.delta = pointer<float>(stats[2]);
  const auto &[device, stream, cubin] = place;
  trie_attention_backward(a, OnDevice(device), pointer<void>(stream), cubin);
}

} // namespace

void bind_attention(py::module_ &m) {
  m.def("cuda_trie_attention_forward", &forward, py::call_guard<py::gil_scoped_release>());
  m.def("cuda_trie_attention_backward", &backward, py::call_guard<py::gil_scoped_release>());
}

} // namespace tw::cuda
