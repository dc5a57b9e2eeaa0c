// Binding of the decode plan: Python's page tables in, one int32 array with the whole plan out.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "decode_plan.h"

namespace py = pybind11;

namespace tw {

namespace {

using Counts = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;
using Sizes = std::array<int64_t, 4>; // rows, pages, items, partial slots
constexpr const char *kSizeNames[] = {"rows", "pages", "items", "slots"};

std::string sequence(size_t s) { return "sequence " + std::to_string(s); }

// The first `count` pages of a table: int32 arrays are read in place, anything else is converted.
class TableReader {
public:
  explicit TableReader(int32_t page_size) : page_size_(page_size) {}

  const int32_t *read(py::handle table, size_t s, int64_t length) {
    const int64_t count = (length + page_size_ - 1) / page_size_;
    const int32_t *pages = PyList_Check(table.ptr()) ? read_list(table, s, length, count)
                                                     : read_array(table, s, length, count);
    const int64_t limit = INT32_MAX / page_size_;
    const auto bad = std::find_if(pages, pages + count,
                                  [&](int32_t page) { return page < 0 || page >= limit; });
    if (bad != pages + count) refuse(s, bad - pages, std::to_string(*bad));
    return pages;
  }

private:
  void check_count(size_t s, int64_t length, int64_t count, int64_t available) const {
    if (available < count)
      throw py::value_error(sequence(s) + ": " + std::to_string(length) + " tokens need " +
                            std::to_string(count) + " pages of " + std::to_string(page_size_) +
                            ", its table has " + std::to_string(available));
  }

  [[noreturn]] void refuse(size_t s, int64_t index, const std::string &page) const {
    throw py::value_error(sequence(s) + ", table entry " + std::to_string(index) + ": page " + page +
                          " is not in [0, " + std::to_string(INT32_MAX / page_size_) + ")");
  }

  const int32_t *read_list(py::handle list, size_t s, int64_t length, int64_t count) {
    check_count(s, length, count, PyList_GET_SIZE(list.ptr()));
    pages_.resize(count);
    for (int64_t i = 0; i < count; ++i) {
      PyObject *item = PyList_GET_ITEM(list.ptr(), i);
      if (!PyLong_Check(item) || PyBool_Check(item))
        throw py::type_error(sequence(s) + ", table entry " + std::to_string(i) +
                             ": a page is an integer, got " + Py_TYPE(item)->tp_name);
      int overflow = 0;
      const long page = PyLong_AsLongAndOverflow(item, &overflow);
      if (overflow || page < 0 || page > INT32_MAX) refuse(s, i, py::str(item));
      pages_[i] = static_cast<int32_t>(page);
    }
    return pages_.data();
  }

  const int32_t *read_array(py::handle table, size_t s, int64_t length, int64_t count) {
    const auto any = py::array::ensure(table);
    if (!any || any.ndim() != 1 || (any.dtype().kind() != 'i' && any.dtype().kind() != 'u'))
      throw py::type_error(sequence(s) + ": a page table is a list, a NumPy array or a tensor of "
                                         "integers with one dimension");
    check_count(s, length, count, any.size());
    if (py::isinstance<py::array_t<int32_t>>(any) && any.strides(0) == sizeof(int32_t)) {
      held_ = any;
      return static_cast<const int32_t *>(any.data());
    }
    const auto wide = Counts(any);
    pages_.resize(count);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t page = wide.data()[i];
      if (page < 0 || page > INT32_MAX) refuse(s, i, std::to_string(page));
      pages_[i] = static_cast<int32_t>(page);
    }
    return pages_.data();
  }

  const int32_t page_size_;
  std::vector<int32_t> pages_;
  py::array held_;
};

void check_fits(const Sizes &sizes, const Sizes &capacity) {
  for (size_t i = 0; i < sizes.size(); ++i)
    if (sizes[i] > capacity[i])
      throw py::value_error("the plan has " + std::to_string(sizes[i]) + " " + kSizeNames[i] +
                            ", but its capacity is " + std::to_string(capacity[i]));
}

// rows, positions, slots, merge_ptr, merge_slots, items, pages, each padded to the capacity: the
// rows beyond the plan's are the caller's rows beyond its own, write nowhere and merge nothing;
// the items beyond have no rows.
py::array_t<int32_t> pack(const DecodePlan &plan, const Sizes &capacity) {
  const auto [rows, pages, items, slots] = capacity;
  py::array_t<int32_t> packed(4 * rows + 1 + slots + 6 * items + pages);
  int32_t *at = packed.mutable_data();
  const auto append = [&](const int32_t *from, int64_t count, int64_t padded, int32_t fill) {
    std::fill(std::copy(from, from + count, at), at + padded, fill);
    at += padded;
  };
  const auto append_all = [&](const std::vector<int32_t> &from, int64_t padded, int32_t fill) {
    append(from.data(), from.size(), padded, fill);
  };
  append_all(plan.rows, rows, 0);
  for (int64_t row = plan.rows.size(); row < rows; ++row)
    packed.mutable_data()[row] = static_cast<int32_t>(row);
  append_all(plan.positions, rows, -1);
  append_all(plan.slots, rows, -1);
  append_all(plan.merge_ptr, rows + 1, plan.merge_ptr.back());
  append_all(plan.merge_slots, slots, 0);
  static_assert(sizeof(DecodeItem) == 6 * sizeof(int32_t));
  append(reinterpret_cast<const int32_t *>(plan.items.data()), 6 * plan.items.size(), 6 * items, 0);
  append_all(plan.pages, pages, 0);
  return packed;
}

// The fields of DecodeCosts in order.
using CostFields = std::tuple<int32_t, int32_t, int32_t, int32_t, int32_t, int32_t, double, double,
                              double, double, double, double, double, std::vector<double>>;

DecodeCosts costs_of(const CostFields &fields) {
  return std::apply([](const auto &...field) { return DecodeCosts{field...}; }, fields);
}

// lengths and new_tokens have one dimension; page_size and the integers of `costs` are at least 1,
// and those of the capacity in [0, 2^31).
py::tuple decode_plan(const py::sequence &page_tables, const Counts &lengths,
                      const Counts &new_tokens, int32_t page_size, const DecodeCosts &costs,
                      bool share, const std::optional<Sizes> &capacity) {
  const size_t count = page_tables.size();
  if (static_cast<size_t>(lengths.size()) != count ||
      static_cast<size_t>(new_tokens.size()) != count)
    throw py::value_error(std::to_string(count) + " page tables need as many lengths and "
                          "new_tokens, got " + std::to_string(lengths.size()) + " and " +
                          std::to_string(new_tokens.size()));
  DecodePlanner planner(page_size, share);
  TableReader reader(page_size);
  for (size_t s = 0; s < count; ++s) {
    const int64_t length = lengths.data()[s], fresh = new_tokens.data()[s];
    if (length < 1 || length > INT32_MAX - page_size)
      throw py::value_error(sequence(s) + ": length " + std::to_string(length) +
                            " is not in [1, 2^31 - page_size)");
    if (fresh < 1 || fresh > length)
      throw py::value_error(sequence(s) + ": new_tokens must be in [1, length = " +
                            std::to_string(length) + "], got " + std::to_string(fresh));
    const py::object table = page_tables[s];
    planner.add(reader.read(table, s, length), static_cast<int32_t>(length),
                static_cast<int32_t>(fresh));
  }
  const DecodePlan plan = planner.plan(costs);
  const Sizes sizes{static_cast<int64_t>(plan.rows.size()),
                    static_cast<int64_t>(plan.pages.size()),
                    static_cast<int64_t>(plan.items.size()),
                    static_cast<int64_t>(plan.merge_slots.size())};
  if (capacity) check_fits(sizes, *capacity);
  const auto [rows, pages, items, slots] = sizes;
  return py::make_tuple(pack(plan, capacity.value_or(sizes)),
                        py::make_tuple(rows, pages, items, slots), plan.predicted);
}

} // namespace

void bind_decode_plan(py::module_ &m) {
  m.def(
      "decode_plan",
      [](const py::sequence &page_tables, const Counts &lengths, const Counts &new_tokens,
         int32_t page_size, const CostFields &costs, bool share,
         const std::optional<Sizes> &capacity) {
        return decode_plan(page_tables, lengths, new_tokens, page_size, costs_of(costs), share,
                           capacity);
      },
      py::arg("page_tables"), py::arg("lengths"), py::arg("new_tokens"), py::arg("page_size"),
      py::arg("costs"), py::arg("share"), py::arg("capacity"));
}

} // namespace tw
