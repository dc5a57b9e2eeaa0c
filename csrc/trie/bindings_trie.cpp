// Binding of the trie builder and of what follows from a trie's geometry. Arrays are NumPy's.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "radix.h"
#include "schedule.h"

namespace py = pybind11;

namespace tw {

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
  // Stands in every function that Python calls and that reads paths: when it returns or throws, the
  // caller may change the list that was read last, so the reader keeps a copy.
  struct Scope {
    PathReader &reader;
    ~Scope() { reader.copy_held(); }
  };

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
    objects_.resize(i);
    held_ = py::reinterpret_borrow<py::object>(path);
    ids_.resize(n);
    for (; i < n; ++i) {
      int overflow = 0;
      if (!PyLong_Check(items[i]) || PyBool_Check(items[i]))
        throw py::type_error(at(index) + ", token " + std::to_string(i) +
                             ": ids must be integers, got " + Py_TYPE(items[i])->tp_name);
      const long long id = PyLong_AsLongLongAndOverflow(items[i], &overflow);
      ids_[i] = checked_id(overflow ? overflow * INT64_MAX : id, index, i);
      objects_.push_back(items[i]);
    }
  }

  void copy_held() {
    if (!held_ || !PyList_Check(held_.ptr())) return;
    held_ = py::reinterpret_steal<py::object>(PySequence_Tuple(held_.ptr()));
    if (held_) return;
    PyErr_Clear();
    objects_.clear();
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

  std::vector<PyObject *> objects_; // whose ids are the first of ids_
  py::object held_;                 // keeps them alive
  std::vector<int32_t> ids_;
};

using Values = py::array_t<float, py::array::c_style | py::array::forcecast>;

class TrieBuilder {
public:
  explicit TrieBuilder(std::vector<std::string> columns)
      : names_(std::move(columns)), trie_(names_.size()) {}

  // columns: in the order of their names, each with a row for every path, of as many numbers as the
  // path has tokens.
  void add(const py::sequence &paths, const std::vector<py::sequence> &columns) {
    const PathReader::Scope scope{reader_};
    const size_t count = paths.size();
    std::vector<Values> rows(columns.size());
    std::vector<const float *> values(columns.size());
    for (size_t i = 0; i < count; ++i) {
      const py::object path = paths[i];
      const std::vector<int32_t> &ids = reader_.read(path, num_paths());
      for (size_t c = 0; c < columns.size(); ++c) {
        rows[c] = Values::ensure(py::object(columns[c][i]));
        if (!rows[c] || rows[c].ndim() != 1 || static_cast<size_t>(rows[c].size()) != ids.size())
          throw py::value_error(at(num_paths()) + " has " + std::to_string(ids.size()) +
                                " tokens: its " + names_[c] + " must be as many numbers");
        values[c] = rows[c].data();
      }
      trie_.insert(ids.data(), ids.size(), values);
    }
  }

  size_t shared_prefix(py::handle path) {
    const PathReader::Scope scope{reader_};
    const std::vector<int32_t> &ids = reader_.read(path, num_paths());
    return trie_.shared_prefix(ids.data(), ids.size());
  }

  size_t num_tokens() const { return trie_.num_tokens(); }

  py::tuple build() const {
    if (num_paths() == 0) throw py::value_error("no paths: a trie needs at least one");
    FlatTrie flat = trie_.flatten();
    py::list columns;
    for (auto &column : flat.columns) columns.append(to_numpy(std::move(column)));
    return py::make_tuple(to_numpy(std::move(flat.tokens)), to_numpy(std::move(flat.positions)),
                          to_numpy(std::move(flat.parents)),
                          to_numpy(std::move(flat.subtree_ends)),
                          to_numpy(std::move(flat.path_ends)), columns);
  }

private:
  size_t num_paths() const { return trie_.path_ends().size(); }

  std::vector<std::string> names_;
  RadixBuilder trie_;
  PathReader reader_;
};

using Ints = py::array_t<int32_t, py::array::c_style>;

void check_window(int64_t window) {
  if (window < 1) throw py::value_error("window must be at least 1, got " + std::to_string(window));
}

py::tuple schedule_of(const Ints &subtree_ends, int32_t block_q, int32_t block_kv,
                      std::optional<int64_t> window) {
  if (block_q < 1 || block_kv < 1) throw py::value_error("block sizes must be at least 1");
  if (window) check_window(*window);
  BlockSchedule s =
      block_schedule(subtree_ends.data(), subtree_ends.size(), block_q, block_kv, window);
  return py::make_tuple(to_numpy(std::move(s.row_ptr)), to_numpy(std::move(s.full_end)),
                        to_numpy(std::move(s.kv_blocks)), to_numpy(std::move(s.q_range)),
                        to_numpy(std::move(s.q_order)), to_numpy(std::move(s.kv_order)),
                        to_numpy(std::move(s.q_starts)));
}

} // namespace

void bind_trie(py::module_ &m) {
  py::class_<TrieBuilder>(m, "TrieBuilder")
      .def(py::init<std::vector<std::string>>(), py::arg("columns"))
      .def("add", &TrieBuilder::add, py::arg("paths"), py::arg("columns"))
      .def("shared_prefix", &TrieBuilder::shared_prefix, py::arg("path"))
      .def_property_readonly("num_tokens", &TrieBuilder::num_tokens)
      .def("build", &TrieBuilder::build);
  m.def(
      "longest_path",
      [](const Ints &subtree_ends) {
        return longest_path(subtree_ends.data(), subtree_ends.size());
      },
      py::arg("subtree_ends"));
  m.def(
      "window_starts",
      [](const Ints &subtree_ends, int64_t window) {
        check_window(window);
        return to_numpy(window_starts(subtree_ends.data(), subtree_ends.size(), window));
      },
      py::arg("subtree_ends"), py::arg("window"));
  m.def(
      "node_segments",
      [](const Ints &subtree_ends) {
        return to_numpy(node_segments(subtree_ends.data(), subtree_ends.size()));
      },
      py::arg("subtree_ends"));
  m.def("block_schedule", &schedule_of, py::arg("subtree_ends"), py::arg("block_q"),
        py::arg("block_kv"), py::arg("window") = std::nullopt);
}

} // namespace tw
