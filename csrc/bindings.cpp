// tw_kernels._C: the compiled half of tw_kernels, free of torch. Arrays in and out are NumPy's.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "cpu/bindings_cpu.h"
#include "cuda/bindings.h"
#include "trie/bindings_decode.h"
#include "trie/radix.h"
#include "trie/schedule.h"

namespace py = pybind11;

namespace {

template <class T> py::array_t<T> to_numpy(std::vector<T> &&values) {
  auto *owner = new std::vector<T>(std::move(values));
  py::capsule free(owner, [](void *p) { delete static_cast<std::vector<T> *>(p); });
  return py::array_t<T>(owner->size(), owner->data(), free);
}

std::string at(size_t path) { return "path " + std::to_string(path); }

int32_t checked_id(int64_t id, size_t path, size_t token) {
  if (id >= 0 && id <= INT32_MAX) return static_cast<int32_t>(id);
  throw py::value_error(at(path) + ", token " + std::to_string(token) + ": id " +
                        std::to_string(id) + (id < 0 ? " is negative" : " does not fit in int32"));
}

size_t checked_length(py::ssize_t n, size_t path) {
  if (n == 0) throw py::value_error(at(path) + " is empty: a path needs at least one token");
  if (n > INT32_MAX)
    throw py::value_error(at(path) + " has " + std::to_string(n) +
                          " tokens: at most 2^31 - 1 fit in a trie");
  return static_cast<size_t>(n);
}

// Reads paths one after the other as int32 ids. Consecutive calls of one trajectory are lists that
// hold the very same int objects for their shared prefix, so equal pointers save the conversion.
class PathReader {
public:
  const std::vector<int32_t> &read(py::handle path, size_t index) {
    if (PyList_Check(path.ptr()) || PyTuple_Check(path.ptr()))
      read_objects(path, index);
    else
      read_array(path, index);
    return ids_;
  }

private:
  void read_objects(py::handle path, size_t index) {
    const size_t n = checked_length(PySequence_Fast_GET_SIZE(path.ptr()), index);
    PyObject **items = PySequence_Fast_ITEMS(path.ptr());
    const size_t limit = std::min(n, objects_.size());
    size_t i = std::mismatch(items, items + limit, objects_.begin()).first - items;
    objects_.assign(items, items + n);
    held_ = py::reinterpret_borrow<py::object>(path); // keeps the compared objects alive
    ids_.resize(n);
    for (; i < n; ++i) {
      int overflow = 0;
      if (!PyLong_Check(items[i]))
        throw py::type_error(at(index) + ", token " + std::to_string(i) +
                             ": ids must be integers, got " + Py_TYPE(items[i])->tp_name);
      const long long id = PyLong_AsLongLongAndOverflow(items[i], &overflow);
      ids_[i] = checked_id(overflow ? overflow * INT64_MAX : id, index, i);
    }
  }

  void read_array(py::handle path, size_t index) {
    objects_.clear();
    const auto array = py::array::ensure(path);
    if (!array || array.ndim() != 1 || (array.dtype().kind() != 'i' && array.dtype().kind() != 'u'))
      throw py::type_error(at(index) + ": a path is a list, a NumPy array or a tensor of integer "
                                       "ids with one dimension");
    const size_t n = checked_length(array.shape(0), index);
    const auto values = py::array_t<int64_t, py::array::c_style | py::array::forcecast>(array);
    ids_.resize(n);
    for (size_t i = 0; i < n; ++i) ids_[i] = checked_id(values.data()[i], index, i);
  }

  std::vector<PyObject *> objects_;
  py::object held_;
  std::vector<int32_t> ids_;
};

using Weights = py::array_t<float, py::array::c_style | py::array::forcecast>;

py::tuple build_trie(const py::sequence &paths, const py::object &weights) {
  const size_t count = paths.size();
  if (count == 0) throw py::value_error("no paths: a trie needs at least one");
  if (count > INT32_MAX)
    throw py::value_error(std::to_string(count) + " paths: at most 2^31 - 1 fit in a trie");
  if (!weights.is_none() && py::len(weights) != count)
    throw py::value_error(std::to_string(py::len(weights)) + " weight lists for " +
                          std::to_string(count) + " paths: give one per path");
  tw::RadixBuilder builder;
  PathReader reader;
  for (size_t i = 0; i < count; ++i) {
    const py::object path = paths[i];
    const std::vector<int32_t> &ids = reader.read(path, i);
    if (weights.is_none()) {
      builder.insert(ids.data(), ids.size(), nullptr);
      continue;
    }
    const auto w = Weights::ensure(py::object(weights[py::int_(i)]));
    if (!w || w.ndim() != 1 || static_cast<size_t>(w.size()) != ids.size())
      throw py::value_error(at(i) + " has " + std::to_string(ids.size()) +
                            " tokens: its weights must be as many numbers");
    builder.insert(ids.data(), ids.size(), w.data());
  }
  tw::FlatTrie flat = builder.flatten();
  return py::make_tuple(to_numpy(std::move(flat.tokens)), to_numpy(std::move(flat.positions)),
                        to_numpy(std::move(flat.parents)), to_numpy(std::move(flat.subtree_ends)),
                        to_numpy(std::move(flat.positive_weights)),
                        to_numpy(std::move(flat.negative_weights)),
                        to_numpy(std::move(flat.path_ends)));
}

using Ints = py::array_t<int32_t, py::array::c_style>;

py::tuple block_schedule(const Ints &subtree_ends, int32_t block_q, int32_t block_kv) {
  if (block_q < 1 || block_kv < 1) throw py::value_error("block sizes must be at least 1");
  tw::BlockSchedule s =
      tw::block_schedule(subtree_ends.data(), subtree_ends.size(), block_q, block_kv);
  return py::make_tuple(to_numpy(std::move(s.row_ptr)), to_numpy(std::move(s.full_end)),
                        to_numpy(std::move(s.kv_blocks)), to_numpy(std::move(s.q_range)),
                        to_numpy(std::move(s.q_order)), to_numpy(std::move(s.kv_order)));
}

} // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of tw_kernels.";
  m.def("build_trie", &build_trie, py::arg("paths"), py::arg("weights"));
  m.def(
      "node_segments",
      [](const Ints &subtree_ends) {
        return to_numpy(tw::node_segments(subtree_ends.data(), subtree_ends.size()));
      },
      py::arg("subtree_ends"));
  m.def("block_schedule", &block_schedule, py::arg("subtree_ends"), py::arg("block_q"),
        py::arg("block_kv"));
  tw::bind_decode_plan(m);
  tw::bind_cpu(m);
  tw::cuda::bind_cuda(m);
}
